"""Walk a program once and apply the rules: which factors the dims of every value are made of
(docs/design.md, "Factors").

In: a normalized program. Out: `Analysis`: per op its operand dims, output dims and, per factor,
the roles that it has there.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch

import tspc.rules  # noqa: F401  fills the registries
from tspc.base.context import Keywords
from tspc.factors.factor import Dim, Dims, Factor, Factors
from tspc.factors.notation import Event, Op, apply, fallback, pointwise
from tspc.factors.registry import COMPUTED, RULES
from tspc.ir.binding import bind, schema
from tspc.ir.program import OUTPUT, PLACEHOLDERS, Node, Program, Ref, Type

aten = torch.ops.aten
EXTRA_POINTWISE = {aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar}
CONTRACTIONS = ("matmul", "einsum", "bmm")
REFUSED = "refused"
VANISHED = "the rule does not account for it"  # no rule leaves any, else the tests fail


@dataclass
class Record:
    """What an op does to the factors.

    carried: leaves per operand and result. roles: leaf -> {(role, operand, why)}.
    """

    index: int
    node: Node
    refs: list[Ref | None]
    ins: list[Dims]
    outs: list[Dims]
    events: list[Event]
    carried_in: list[set[Factor]] = field(default_factory=list)
    carried_out: list[set[Factor]] = field(default_factory=list)
    roles: dict[Factor, set[tuple[str, int | None, str]]] = field(default_factory=dict)

    def tell(self, f: Factor, role: str, operand: int | None, why: str) -> None:
        self.roles.setdefault(f, set()).add((role, operand, why))


@dataclass
class Analysis:
    """What the rules say of a program.

    env: (name, item) -> dims. fallbacks: (node, op) without a rule. sealed: node -> the (result,
    dim)s made as a whole. refused: nodes that run as a whole.
    """

    program: Program
    F: Factors
    env: dict[tuple[str, int], Dims]
    records: list[Record]
    fallbacks: list[tuple[str, str]]
    sealed: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    refused: Container[str] = ()

    @cached_property
    def makers(self) -> dict[str, Record]:
        """Value -> the record of the op that makes it."""
        return {r.node.name: r for r in self.records}


def factorize(
    program: Program,
    sealed: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    refused: Container[str] = (),
) -> Analysis:
    """Apply every op's rule once, in order.

    sealed: node -> (result, dim)s that are factors of their own, whatever the rule makes them of.
    refused: nodes of which no rule is asked.
    """
    walk = _Walk(program, sealed or {}, refused)
    for n in program.nodes:
        if n.name not in program.replicated:
            walk.node(n)
    _close(walk.analysis)
    return walk.analysis


class _Walk:
    """The rules applied so far."""

    def __init__(
        self,
        program: Program,
        sealed: Mapping[str, Sequence[tuple[int, int]]],
        refused: Container[str],
    ):
        self.F = Factors(program.hints)
        self.analysis = Analysis(program, self.F, {}, [], [], sealed, refused)
        self.types = {n.name: n.types for n in program.nodes}
        self.slices: dict[Ref, list[Keywords]] = {}  # of each value: their arguments
        self.users: dict[str, list[Node]] = {}
        for n in program.nodes:
            if n.op == aten.slice.Tensor:
                self.slices.setdefault(n.args[0], []).append(bind(n)[0])
            for r in n.refs():
                self.users.setdefault(r.name, []).append(n)

    def type(self, r: Ref) -> Type:
        t = self.types[r.name][r.item or 0]
        assert t is not None, f"{r} is no tensor"
        return t

    def dims(self, r: Ref) -> Dims:
        env, at = self.analysis.env, (r.name, r.item or 0)
        if at not in env and r.name in self.analysis.program.replicated:
            env[at] = self.new_dims(r.name, self.type(r))
        return env[at]

    def new_dims(self, name: str, t: Type) -> list[Dim]:
        return [self.F.dim(s, f"{name}.{k}") for k, s in enumerate(t.shape)]

    def node(self, n: Node) -> None:
        a, F = self.analysis, self.F
        if n.op in PLACEHOLDERS:
            a.env[n.name, 0] = self.new_dims(n.name, n.type)
            return
        if n.op == OUTPUT:
            refs = list[Ref | None](n.refs())
            a.records.append(
                Record(len(a.records), n, refs, list(map(self.dims, n.refs())), [], [])
            )
            return
        op = self.op(n)
        outs = self.results(op)
        for item, k in a.sealed.get(n.name, ()):
            op.event("whole", outs[item][k], None, "sealed")
            sealed = op.new(op.shape(item)[k], "sealed")
            outs[item] = [*outs[item][:k], sealed, *outs[item][k + 1 :]]
        for item, (dims, t) in enumerate(zip(outs, n.types)):
            if t is None:
                continue
            assert len(dims) == len(t.shape), (n, dims, t.shape)
            for d, s in zip(dims, t.shape):
                assert F.size(d) == s or F.same(F.size(d), s), (n.op, n.name, F.show(d), s)
            a.env[n.name, item] = dims
        a.records.append(Record(len(a.records), n, list(op.refs), op.ins, outs, op.events))

    def op(self, n: Node) -> Op:
        """What its rule sees."""
        args: Keywords = {}
        refs: list[Ref | None] = list(n.refs())
        with suppress(AttributeError, RuntimeError):
            args, refs = bind(n)
        replicated = self.analysis.program.replicated
        op = Op(
            n,
            args,
            refs,
            [self.dims(r) if r is not None else () for r in refs],
            self.F,
            weak=[r is not None and r.name in replicated for r in refs],
        )
        if any(c in str(n.op) for c in CONTRACTIONS):
            op.exchanged = self.exchanged(n)
        if n.op == aten.slice.Tensor:
            op.siblings = self.slices[n.args[0]]
        return op

    def results(self, op: Op) -> list[Dims]:
        """The dims that the op's rule says."""
        n = op.node
        if n.name in self.analysis.refused:
            return self.left_alone(op)
        if n.op in RULES:
            return apply(RULES[n.op], op)
        if n.op in COMPUTED and COMPUTED[n.op] is not pointwise:
            return list(COMPUTED[n.op](op))
        if n.op in COMPUTED or n.op in EXTRA_POINTWISE or (op.args and schema(n.op)[1]):
            return pointwise(op)
        self.analysis.fallbacks.append((n.name, str(n.op)))
        return fallback(op)

    def exchanged(self, n: Node) -> int | None:
        """Follow same-shaped users to the first op along a dim (softmax): that dim is the one to
        exchange."""
        todo, left = [n], 12
        while todo and left:
            m, left = todo.pop(0), left - 1
            for u in self.users.get(m.name, ()):
                if "softmax" in str(u.op):
                    return u.args[1] % len(u.type.shape)
                if u.types and u.types[0] and u.types[0].shape == n.type.shape:
                    todo.append(u)
        return None

    def left_alone(self, op: Op) -> list[Dims]:
        """A refused op is made as a whole; what has the shape of an operand is cut like it
        after."""
        outs = fallback(op, REFUSED)
        for item, t in enumerate(op.node.types):
            for r, dims, weak in zip(op.refs, op.ins, op.weak):
                if t and r is not None and not weak and self.type(r).shape == t.shape:
                    outs[item] = dims
        return outs


def homogeneous(F: Factors, dim: Sequence[Factor], f: Factor) -> bool:
    """Every segment carries f: the pieces of a sum over the dim then add up to the sum."""
    return any(
        g is f or (g.cat and all(homogeneous(F, d, f) for d in F.flat(g.cat)))
        for g in F.expand(dim)
    )


def in_segment(F: Factors, dims: Sequence[Sequence[Factor]] | None, f: Factor) -> bool:
    """The factor makes up only a part of a dim: a sum of which it is one term."""
    return any(f in F.leaves(tuple(d)) and f not in F.expand(tuple(d)) for d in dims or ())


def _close(a: Analysis) -> None:
    """Classes are final: read every dim as leaves, and find the leaves that an op meets twice."""
    F = a.F
    leaves = lru_cache(None)(lambda dim: tuple(F.leaves(dim)))
    for r in a.records:
        r.carried_in = [_carried(r, dims, F, leaves) for dims in r.ins]
        r.carried_out = [_carried(r, dims, F, leaves) for dims in r.outs]
        for e in r.events:
            for f in leaves(e.dim):
                if e.role == "reduce" and not homogeneous(F, e.dim, f):
                    r.tell(f, "twice", None, "in part of a summed dim")
                r.tell(f, e.role, e.operand, e.why)
        for f, roles in r.roles.items():
            if any(role == "reduce" for role, *_ in roles) and any(f in s for s in r.carried_out):
                roles.add(("twice", None, "summed and kept"))
        if r.node.op in (OUTPUT, aten.slice.Tensor):  # a slice may leave segments out
            continue
        kept = set().union(*r.carried_out, r.roles)
        for i, carried in enumerate(r.carried_in):
            for f in carried - kept:
                if f.size != 0:
                    r.tell(f, "whole", i, VANISHED)


def _carried(
    r: Record, dims: Dims, F: Factors, leaves: Callable[[Dim], tuple[Factor, ...]]
) -> set[Factor]:
    """The leaves of a tensor's dims; those met twice have a role."""
    seen: set[Factor] = set()
    for d in map(tuple, dims):
        for f in seen.intersection(leaves(d)):
            r.tell(f, "twice", None, "in two dims")
        fs = F.expand(d)
        if len(fs) > 1 and len(fs) != len(set(fs)):
            r.tell(fs[0], "twice", None, "in one dim")
        seen.update(leaves(d))
    return seen
