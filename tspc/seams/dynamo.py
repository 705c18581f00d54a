"""What of Dynamo is private and used here; `tests/tspc/seams/test_dynamo.py` fails where it
changes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager
from types import CodeType
from typing import NoReturn

import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo import convert_frame, eval_frame, pgo
from torch._dynamo.exc import unimplemented
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import VariableBuilder
from torch._guards import CompileId, TracingContext
from torch.utils.weak import TensorWeakRef

from tspc.seams.compiler import replace_member

Codes = Iterator[CodeType]
Stand = AbstractContextManager[torch.Tensor] | None
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


def stand_ins(backend: object, stand_in: Callable[[torch.Tensor, Codes], Stand]) -> None:
    """Whatever this backend is given, Dynamo traces with another tensor in the place of one.

    stand_in(x, functions being traced, innermost first) -> None for x itself, or a context of the
    tensor to trace with. The compiled code is given x.
    """
    plain = VariableBuilder.wrap_tensor

    def wrap(self: VariableBuilder, value: torch.Tensor) -> VariableTracker:
        compiler = self.tx.output.compiler_fn
        inner = None if compiler is None else eval_frame.innermost_backend(compiler)
        ours = getattr(inner, "compiler_fn", inner) is backend
        stand = stand_in(value, _traced(self.tx)) if ours else None
        if stand is None:
            return plain(self, value)
        with stand as other:
            out = plain(self, other)
            guard_instead([id(other)])
            return out

    replace_member(VariableBuilder, "wrap_tensor", wrap)


def leave_to_python(why: str) -> NoReturn:
    """Called while Dynamo traces: the graph ends before what it is at."""
    unimplemented(gb_type="tspc", context=why, explanation=why, hints=[])


def _traced(tx: InstructionTranslatorBase) -> Iterator[CodeType]:
    at: InstructionTranslatorBase | None = tx
    while at is not None:
        yield at.f_code
        at = getattr(at, "parent", None)


def guard_instead(replaced: Container[int]) -> None:
    """While Dynamo's backend works: its guards on these tensors, by id, are made of what stands at
    their places when it is done."""
    for guard in TracingContext.get().guards_context.dynamo_guards:
        match = guard.create_fn
        if isinstance(match, functools.partial) and "value" in match.keywords:
            ref = match.keywords["value"]
            if isinstance(ref, TensorWeakRef) and id(ref()) in replaced:
                guard.create_fn = match.func


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
