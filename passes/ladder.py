"""Never fall over: what an analysis cannot treat runs replicated, and the passes start again.

In: an attempt and what it refuses. Rung 1: the op, or the region, at which an error of tspc's own
arose is refused. Rung 2: all is refused; the program runs replicated, its weights gathered one op
at a time. What is said on purpose, and what would be wrong, stays an error. All of it is a function
of the program, so all ranks climb alike. TSPC_STRICT_INTERNAL=1 raises instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

import torch

from tspc.base.errors import CaptureError, InternalError, RuleError, TspcError, UnsupportedError
from tspc.base.journal import log
from tspc.factors.notation import Op
from tspc.ir.program import Node, Program
from tspc.passes.analyse.factorize import Record
from tspc.passes.analyse.fold import Fold
from tspc.passes.analyse.refused import NOTHING, Refused
from tspc.passes.analyse.regions import Region
from tspc.seams.lowering import TorchDynamoException

T = TypeVar("T")
RETRIES = 16  # refusals before all is refused
ADVICE = "please report it with the log at debug level"
# what a step of torch's own says, and what is of this machine: no rung helps
SAID = (TorchDynamoException, torch.OutOfMemoryError, MemoryError, OSError)


def climb(
    attempt: Callable[[Refused], T], program: Program, strict: bool, start: Refused = NOTHING
) -> T:
    """The result of the first attempt that does not fail. program: as it was captured."""
    refused = start
    while True:
        try:
            return attempt(refused)
        except Exception as e:
            refused = after(refused, e, program, strict)


def after(refused: Refused, e: Exception, program: Program, strict: bool) -> Refused:
    """What to refuse after this error; called while it is handled. Raises it if it is no error
    of tspc's own, and under TSPC_STRICT_INTERNAL=1."""
    if not is_internal(e) or os.environ.get("TSPC_STRICT_INTERNAL") == "1":
        raise e
    cause, where = _text(e), _source(e, program)
    if strict:
        raise UnsupportedError(
            f"{where}: {cause}: an error inside of tspc; {ADVICE}, or allow running replicated "
            "by strict=False"
        ) from e
    if refused.everything:
        raise CaptureError(
            f"{where}: {cause}: an error inside of tspc, which replicated execution does not "
            f"avoid; {ADVICE}"
        ) from e
    log.debug("%s: %s", where, cause, exc_info=e)
    if len(refused.nodes) + len(refused.regions) < RETRIES:
        for culprit in at_hand(e):
            if isinstance(culprit, Node):
                name = _next(refused, culprit.name, program)
                if name:
                    return replace(refused, nodes={**refused.nodes, name: cause})
            elif culprit and culprit not in refused.regions:
                return replace(refused, regions={**refused.regions, culprit: cause})
    return replace(refused, everything=cause, source=where)


def _next(refused: Refused, name: str, program: Program) -> str:
    """The node, or where it is refused already, the one of which a pass made it."""
    names = {n.name for n in program.nodes if n.is_call}
    while name and (name in refused.nodes or not any(_made_of(name, m) for m in names)):
        name = name.rpartition(".")[0]
    return name


def is_internal(e: Exception) -> bool:
    """It was not raised on purpose."""
    if isinstance(e, TspcError):
        return isinstance(e, (InternalError, RuleError))
    return not isinstance(e, SAID)


def at_hand(e: BaseException) -> Iterator[Node | frozenset[str]]:
    """The nodes, and the weights of regions, that the passes were working on: from where the error
    arose outwards."""
    frames = []
    trace: TracebackType | None = e.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        if str(frame.f_globals.get("__name__", "")).startswith("tspc."):
            for value in list(frame.f_locals.values()):
                culprit = _held(value)
                if culprit is not None:
                    yield culprit


def _held(value: object) -> Node | frozenset[str] | None:
    node = value.node if isinstance(value, (Record, Op)) else value
    if isinstance(node, Node):
        return node if node.is_call else None
    return frozenset(value.weights) if isinstance(value, (Region, Fold)) else None


def _made_of(name: str, original: str) -> bool:
    return name == original or name.startswith(f"{original}.")


def _text(e: Exception) -> str:
    """One line: the error, and in which pass it arose."""
    lines = str(e).strip().splitlines()
    said = f"{type(e).__name__}: {lines[0]}" if lines else type(e).__name__
    notes = [n for n in getattr(e, "__notes__", ()) if n.startswith("in pass ")]
    return f"{said} ({notes[0]})" if notes else said


def _source(e: Exception, program: Program) -> str:
    """file:line of the model."""
    sources = [x.source for x in at_hand(e) if isinstance(x, Node)]
    sources += [n.source for n in program.nodes if n.is_call]
    return next(filter(None, sources), program.name)
