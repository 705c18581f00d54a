"""Calls of what was compiled with this backend: whether Dynamo gave tspc its graphs, and which
weights were used whole outside of them. Told once each, with the cause and the bytes; an error
under `strict=True`.
"""

from __future__ import annotations

import functools
import os
import threading
import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn as nn

from tspc.base.errors import UnsupportedError
from tspc.base.journal import log
from tspc.base.state import CALL, remembered
from tspc.runtime.call.wrapped import check_wrapped
from tspc.seams.compiler import on_compile, tracing, why_not_forward, why_outside
from tspc.seams.tensors import tree_leaves

LISTED = 3  # names that a line tells
CHANGE = "change that, or leave this part out of the compiled model"
_STATE = remembered(CALL, threading.local())


@dataclass
class Compiled:
    """What was compiled. has_graph: it had one once. reported: kinds of lines.

    root: a weak reference to the module or function; None for modules that are called without
    `torch.compile`.
    """

    root: Callable[[], object] | None
    strict: bool = False
    has_graph: bool = False
    reported: set[str] = field(default_factory=set)

    def say(self, kind: str, text: str) -> None:
        """Raises `UnsupportedError` if it is strict, at each call."""
        if self.strict:
            raise UnsupportedError(f"{text}, or allow it by strict=False")
        if kind not in self.reported:
            self.reported.add(kind)
            if (dist.get_rank() if dist.is_initialized() else _number("RANK")) == 0:
                log.warning(text)


EAGER = Compiled(None, has_graph=True)


@dataclass
class Call:
    """One call. graphs: of tspc that ran in it. used: parameters used whole, by id, with their
    names and bytes; cause: of the first, with its place."""

    of: Compiled
    graphs: int = 0
    used: dict[int, tuple[str, int]] = field(default_factory=dict)
    cause: str = ""


def _open() -> list[Call]:
    """The calls that this thread is in, outermost first."""
    if not hasattr(_STATE, "calls"):
        _STATE.calls = []
    return _STATE.calls


def given() -> None:
    """The backend made something of a graph of the calls."""
    for c in _open():
        c.of.has_graph = True


def ran() -> None:
    """A graph of tspc ran."""
    for c in _open():
        c.graphs, c.of.has_graph = c.graphs + 1, True


def used(module: nn.Module, name: str, p: torch.Tensor) -> None:
    """A parameter is read whole in Python, not in a graph."""
    calls = _open()
    if not calls or tracing() or id(p) in calls[-1].used:
        return
    call = calls[-1]
    call.used[id(p)] = f"{type(module).__name__}.{name}", p.numel() * p.element_size()
    if not call.cause and "whole" not in call.of.reported:
        call.cause = why_outside(call.of is EAGER)


def of_module() -> bool:
    """Whether this thread is in a call of a compiled module."""
    roots = [c.of.root() for c in _open() if c.of.root is not None]
    return any(isinstance(root, nn.Module) for root in roots)


def enter(compiled: Compiled) -> Call:
    call = Call(compiled)
    _open().append(call)
    return call


def leave(call: Call) -> None:
    assert _open().pop() is call


def eager(module: nn.Module) -> Call | None:
    """Starts a call of a sharded module without `torch.compile`; None inside of another call, and
    once it was told."""
    return None if _open() or EAGER.reported else enter(EAGER)


def watched(
    compiled: Callable[..., object],
    root: object,
    strict: bool,
    prepare: Callable[[list[nn.Module]], object] = len,
) -> Callable[..., object]:
    """What `torch.compile` made, with each call looked at.

    prepare: gets the modules at hand before there is a graph of them.
    """
    of = Compiled(weakref.ref(root), strict)

    @functools.wraps(compiled)
    def run(*args: object, **kwargs: object) -> object:
        if not of.has_graph and _ranks() > 1:
            held = of.root() if of.root is not None else None
            check_wrapped(held)
            prepare([held] if isinstance(held, nn.Module) else _modules(held, (args, kwargs)))
        call = enter(of)
        try:
            out = compiled(*args, **kwargs)
        finally:
            leave(call)
        if not call.graphs or call.used:
            tell(call, (args, kwargs))
        return out

    return run


def tell(call: Call, arguments: object = ()) -> None:
    """After a call: what of it ran whole."""
    of, root = call.of, call.of.root() if call.of.root is not None else None
    if call.used:
        if of.strict or "whole" not in of.reported:
            of.say("whole", _whole(call, root))
    elif not call.graphs and not of.has_graph and "nothing" not in of.reported and _ranks() > 1:
        modules = [root] if isinstance(root, nn.Module) else _modules(root, arguments)
        held = {id(p): p.numel() * p.element_size() for m in modules for p in m.parameters()}
        if held:
            of.say(
                "nothing",
                f"{_name(root)}: Dynamo gave tspc nothing of it: it runs whole on every rank, "
                f"with {len(held)} parameters of {_size(held.values())}: "
                f"{why_not_forward(root)}; {CHANGE}",
            )


def _whole(call: Call, root: object) -> str:
    names = {}
    if isinstance(root, nn.Module):
        names = {id(p): n for n, p in root.named_parameters()}
    listed = [names.get(i, n) for i, (n, _) in call.used.items()]
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return (
        f"{_name(root) + ': ' if root is not None else ''}used whole on every rank, outside of a "
        "compiled graph: "
        f"{', '.join(listed[:LISTED])}{more}, {_size(n for _, n in call.used.values())}: "
        f"{call.cause}; {CHANGE}"
    )


def _modules(function: object, arguments: object) -> list[nn.Module]:
    """Those that a function has at hand."""
    modules, todo, seen = [], [function, *tree_leaves(arguments)], set()
    while todo:
        x = todo.pop()
        if isinstance(x, nn.Module):
            modules.append(x)
        elif isinstance(x, types.FunctionType) and x not in seen:
            seen.add(x)
            todo += [c.cell_contents for c in x.__closure__ or () if _filled(c)]
            if not x.__module__.startswith("torch."):
                todo += [x.__globals__.get(n) for n in x.__code__.co_names]
    return modules


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _name(root: object) -> str:
    return type(root).__name__ if isinstance(root, nn.Module) else getattr(root, "__name__", "?")


def _size(counts: Iterable[int]) -> str:
    count = sum(counts)
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _ranks() -> int:
    """Of the process group, or those that a launcher tells of."""
    return dist.get_world_size() if dist.is_initialized() else _number("WORLD_SIZE")


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else 0


def watch(backend: object, prepare: Callable[[list[nn.Module]], object]) -> None:
    """From now on, whatever is compiled with this backend. prepare: as of `watched`."""
    on_compile(backend, functools.partial(watched, prepare=prepare))
