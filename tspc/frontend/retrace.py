"""What the first trace of a graph decided is kept for the second: Dynamo traces again once the
parameters are stored, and meets the same graph.

In: a Dynamo graph. Out: its `form`, equal for graphs that compute alike on inputs of equal types,
in whatever order they are numbered; and the assumptions of one capture, restated in another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.types import IntLikeType

from tspc.seams.sizes import PythonReferenceAnalysis, sympy_interp

Kinds = Sequence[tuple[str, str]]  # (kind, name) of each graph input


def form(gm: torch.fx.GraphModule, kinds: Kinds, inputs: Sequence[object]) -> object:
    """Compared by `==`; None where a graph is never taken for another: two inputs of one name, a
    tensor of its own, a float that is a symbol."""
    if len(set(kinds)) < len(kinds) or any(isinstance(x, torch.SymFloat) for x in inputs):
        return None
    types = {k: _type(x) for k, x in zip(kinds, inputs)}
    nodes = _nodes(gm, dict(zip(gm.graph.find_nodes(op="placeholder"), kinds)))
    return None if nodes is None else (types, nodes)


def _type(x: object) -> object:
    if isinstance(x, torch.Tensor):
        strides = () if x.layout != torch.strided else tuple(map(str, x.stride()))
        where = x.dtype, x.device, x.requires_grad, x.layout
        return (tuple(map(str, x.shape)), strides, *where)
    return str(x) if isinstance(x, torch.SymInt) else x


def _nodes(
    gm: torch.fx.GraphModule, inputs: Mapping[torch.fx.Node, tuple[str, str]]
) -> list[object] | None:
    """Of a graph and of those that it calls."""
    names: dict[torch.fx.Node, object] = dict(inputs)
    out: list[object] = []

    def argument(a: Any) -> object:
        if isinstance(a, torch.fx.Node):
            return names[a]
        if isinstance(a, (tuple, list)):
            return [type(a), *map(argument, a)]
        if isinstance(a, dict):
            return {k: argument(v) for k, v in a.items()}
        if isinstance(a, slice):
            return ["slice", *map(argument, (a.start, a.stop, a.step))]
        return (type(a), str(a)) if isinstance(a, torch.SymInt) else (type(a), a)

    for i, n in enumerate(n for n in gm.graph.nodes if n not in inputs):
        names[n] = i
        called: object = n.target
        if n.op == "get_attr":
            held = getattr(gm, str(n.target), None)
            called = _nodes(held, {}) if isinstance(held, torch.fx.GraphModule) else None
            if called is None:
                return None
        elif n.op == "placeholder":
            called = None
        out.append((n.op, called, argument(n.args), argument(n.kwargs), n.meta.get("ac_graph_id")))
    return out


def assumed(env: ShapeEnv, since: int) -> tuple[sympy.Expr | Boolean, ...]:
    """What was assumed of sizes from the guard of this number on."""
    return tuple(g.expr for g in env.guards[since:])


def assume(
    guards: Iterable[sympy.Expr | Boolean], sizes: Mapping[sympy.Symbol, IntLikeType]
) -> bool:
    """Each becomes a guard of Dynamo's. False if one is of other sizes than these, or does not
    hold."""
    for g in guards:
        symbols = {s for s in g.free_symbols if isinstance(s, sympy.Symbol)}
        if not symbols <= sizes.keys():
            return False
        values = {s: sizes[s] for s in symbols}
        if not bool(sympy_interp(PythonReferenceAnalysis, values, g)):
            return False
    return True
