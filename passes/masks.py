"""Recognise the masks of attention as predicates over (b, h, q, k): none, causal, key padding, or
both.

In: a normalized program. Out: the same with `is_causal=True` and, for key padding, `attn_mask` of
one row [B, 1, 1, S]; the
two together mean their conjunction, which torch's op does not allow: from here on it is tspc's.
Any other mask stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import sympy
import torch

from tspc.index import At, Cases, clauses, index, is_predicate, substitute
from tspc.program import PLACEHOLDERS, SDPA, Node, Program, Ref, Type
from tspc.rules.index import RULES, Reader
from tspc.sinks import SINK_ATTENTION

KNOWN = (SDPA, SINK_ATTENTION)  # their first six arguments are the same
MAX_SIZE = 200  # nodes of an expression: beyond it the value is data
B, H, Q, K = (sympy.Symbol(s, integer=True, nonnegative=True) for s in "bhqk")


def recognise_masks(program: Program) -> Program:
    """Masks that are known become flags; their nodes die."""
    if not any(n.op in KNOWN for n in program.nodes):
        return program
    env, types = {}, {}
    expressions(program.nodes, env, types)
    nodes: list[Node] = []
    known: set[str] = set()
    for n in program.nodes:
        nodes.append(_rewritten(n, env, types, known) if n.op in KNOWN else n)
        known.add(n.name)
    return replace(program, nodes=tuple(nodes)).without_dead_nodes()


def expressions(nodes: Iterable[Node], env: dict[Ref, Any], types: dict[Ref, Type]) -> None:
    """Adds the index expression of every value without a parameter or float input behind it, and
    the types of all."""
    for n in nodes:
        for item, t in enumerate(n.types):
            if t is not None:
                types[Ref(n.name, item)] = t
                types.setdefault(Ref(n.name), t)
        if n.op in PLACEHOLDERS:
            if not n.type.is_float:
                env[Ref(n.name)] = _data(n)
        elif n.is_call and len(n.types) == 1 and all(r in env for r in n.refs()):
            e = _expression(n, env, types)
            if e is not None:
                env[Ref(n.name)] = e


def _expression(n: Node, env: dict[Ref, Any], types: dict[Ref, Type]) -> Any:
    fn = RULES.get(n.op._schema.name.split("::")[1])
    e = fn(Reader(n, env, types), *n.args, **n.kwargs) if fn is not None else None
    if e is None or (not isinstance(e, Cases) and e.count_ops() > MAX_SIZE):
        return None if n.type.is_float else _data(n)
    return _ones(n, e)


def _data(n: Node) -> Any:
    """A reference to the value itself."""
    at = At(sympy.Symbol(n.name), *(index(d) for d in range(len(n.type.shape))))
    e = _ones(n, at)
    return sympy.Ne(e, 0, evaluate=False) if n.type.dtype == torch.bool else e


def _ones(n: Node, e: Any) -> Any:
    """Dims of size 1 have index 0."""
    gone = {index(d): sympy.Integer(0) for d, s in enumerate(n.type.shape) if s == 1}
    return substitute(e, gone)


def _arguments(n: Node) -> dict[str, Any]:
    names = [a.name for a in n.op._schema.arguments]
    return {"attn_mask": None, "is_causal": False, **dict(zip(names, n.args)), **n.kwargs}


def predicate(e: Any, t: Type) -> Any:
    """The mask as a predicate over (b, h, q, k), None if it is none."""
    rank = len(t.shape)
    names = {index(rank - 1 - j): s for j, s in enumerate((K, Q, H, B)) if rank - 1 - j >= 0}
    if isinstance(e, Cases):
        values = dict(e.values)
        lowest = min(values)
        if any(map(math.isnan, values)) or not set(values) <= {0.0, lowest} or 0.0 not in values:
            return None
        p = substitute(values[0.0], names)
        # a finite fill equals the predicate only where every row has a key: its own
        if lowest != -math.inf and (lowest > -1e9 or substitute(p, {K: Q}) != sympy.true):
            return None
        return p
    return substitute(e, names) if is_predicate(e) else None


def _rewritten(n: Node, env: dict[Ref, Any], types: dict[Ref, Type], known: set[str]) -> Node:
    """known: the nodes before this one."""
    bound = _arguments(n)
    mask = bound["attn_mask"]
    if mask is None or mask not in env:
        return n
    p = predicate(env[mask], types[mask])
    if p is None:
        return n
    causal, padding = bool(bound["is_causal"]), []
    for c in clauses(p):
        if isinstance(c, sympy.Ge) and c.lhs == Q - K:
            causal = True
        elif not c.free_symbols & {Q, H} and c.free_symbols & {K}:
            padding.append(c)
        else:
            return n
    row = None
    if padding:
        keys = types[bound["key"]].shape[-2]
        row = _row(sympy.And(*padding), env, types, known, keys)
        if row is None:
            return n
    args = list(n.args) + [None, 0.0, False][len(n.args) - 3 :]
    args[3], args[5] = row, causal
    kwargs = {k: v for k, v in n.kwargs.items() if k not in ("attn_mask", "is_causal")}
    args[4] = kwargs.pop("dropout_p", args[4])
    return replace(n, args=tuple(args), kwargs=kwargs)


def _row(
    padding: Any, env: dict[Ref, Any], types: dict[Ref, Type], known: set[str], keys: Any
) -> Ref | None:
    """A value of the program [B or 1, 1, 1, keys] that is the padding predicate."""
    for ref, e in env.items():
        t = types[ref]
        if t.dtype != torch.bool or len(t.shape) != 4 or ref.name not in known:
            continue
        if t.shape[1:3] == (1, 1) and t.shape[3] == keys and predicate(e, t) == padding:
            return ref
    return None
