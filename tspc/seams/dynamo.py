"""What of Dynamo is private and used here; `tests/tspc/seams/test_dynamo.py` fails where it
changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import CodeType

import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo import convert_frame, pgo
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._guards import CompileId

MANY = 10_000  # compiles of one function, where none of them stays


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """What is compiled inside is gone afterwards, as what Dynamo learnt of sizes; what was compiled
    before stays, and is not compiled again."""
    learnt = pgo._CODE_STATE, pgo._INIT_CODE_STATE
    before = {id(code): _ids(code) for code in _codes()}
    pgo.reset_code_state()
    try:
        with torch._dynamo.config.patch(recompile_limit=MANY, accumulated_recompile_limit=MANY):
            yield
    finally:
        pgo._CODE_STATE, pgo._INIT_CODE_STATE = learnt
        with convert_frame.compile_lock:
            for code in _codes():
                _forget(code, before.get(id(code), set()))


def _codes() -> list[CodeType]:
    """Of the functions that were compiled."""
    seen = (ref() for ref in convert_frame.input_codes.seen)
    return [code for code in seen if code is not None]


def _ids(code: CodeType) -> set[CompileId]:
    return {e.compile_id for e in _debug_get_cache_entry_list(code)}


def _forget(code: CodeType, kept: set[CompileId]) -> None:
    """All that was compiled of a function but for these."""
    entries = _debug_get_cache_entry_list(code)
    new = [e for e in entries if e.compile_id not in kept]
    if new and len(new) == len(entries):
        reset_code(code)
        return
    for entry in new:
        manager = entry.guard_manager
        if manager.cache_entry is not None and manager.extra_state is not None:
            gone = DeletedGuardManagerWrapper("it was compiled for a plan")
            manager.extra_state.invalidate(manager.cache_entry, gone)
