"""A program with conversions -> one rank's program: sizes become local, conversions become tspc's
ops. Its placeholders are as they are stored, its sizes are over the program's symbols and
`chunk_of(i)`, the rows of a chunk of sequence i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tspc.factors.factor import Dims
from tspc.factors.placement import indices
from tspc.ir.body import Body, chunk_of
from tspc.ir.builder import Builder
from tspc.ir.kinds import (
    ALL_REDUCE,
    CLEAR,
    EMBED,
    GATHER_WEIGHT,
    LOCAL,
    VARY,
    WHOLE,
)
from tspc.ir.program import (
    APART,
    CONSTANT,
    FOLD,
    OUTPUT,
    PLACEHOLDERS,
    Node,
    Program,
    Ref,
    Size,
    Type,
    refs_in,
)
from tspc.ops.attention import ATTENTION, bound
from tspc.ops.library import local_rows
from tspc.passes.analyse.factorize import Record
from tspc.passes.analyse.fold import Fold
from tspc.passes.analyse.outputs import Result
from tspc.passes.analyse.sizes import Sizes
from tspc.passes.analyse.typed import Typed
from tspc.passes.lower import local_op, sequence_ops
from tspc.passes.lower.sequence_ops import Geometry

aten, tspc = torch.ops.aten, torch.ops.tspc


@dataclass(frozen=True)
class Target:
    """What one rank's program is made for. orders: of each sequence. leaving: output -> how it is
    handed out, if it is cut. reduce: what gradients add up in."""

    bodies: Mapping[str, Body]
    orders: tuple[str, ...]
    axis: str
    leaving: Mapping[int, str] = field(default_factory=dict)
    reduce: torch.dtype | None = None


def localize(typed: Typed, target: Target, stored: Callable[[Node], Type]) -> Program:
    """stored: a placeholder as one rank has it."""
    local = _Local(typed, target)
    for n in typed.program.nodes:
        if n.op in PLACEHOLDERS:
            local.b.add(replace(n, types=(stored(n),)))
    local.vary_parameters()
    for n in typed.program.nodes:
        if n.op == OUTPUT:
            local.output(n)
        elif n.op not in PLACEHOLDERS and n.name not in local.varied:
            local.node(n)
    return replace(typed.program, nodes=tuple(local.b.nodes))


def results(typed: Typed, leaving: Mapping[int, str]) -> list[Result | None]:
    """How each output leaves; shapes are the whole ones, over the symbols."""
    sizes = Sizes(typed.factors, {})
    out: list[Result | None] = []
    for i, a in enumerate(typed.program.output.args):
        if not isinstance(a, Ref):
            out.append(None)
            continue
        t = typed.program.type_of(a)
        kind, dim, lead, sequence = "whole", 0, 1, 0
        if i in leaving and typed.places[a.name, a.item or 0] == "S":
            dims = typed.dims[a.name, a.item or 0]
            sequence = typed.sequence(dims) or 0
            dim, lead, _ = sizes.where(dims, typed.leaves[sequence])
            # a DTensor cuts a dim as a whole, not the sequence inside of it
            kind = "whole" if leaving[i] == "sharded" and lead != 1 else leaving[i]
        out.append(Result(kind, tuple(t.shape), t.dtype, dim, lead, sequence=sequence))
    return out


class _Local:
    """The nodes so far."""

    def __init__(self, typed: Typed, target: Target):
        self.typed, self.target = typed, target
        self.b = Builder({n.name: n for n in typed.program.nodes})
        orders = target.orders
        cut = {f: local_rows(chunk_of(i), orders[i]) for i, f in enumerate(typed.leaves)}
        self.sizes, self.whole = Sizes(typed.factors, cut), Sizes(typed.factors, {})
        self.kinds = [r.kind if r is not None else "whole" for r in results(typed, target.leaving)]
        self.varied: set[str] = set()  # in the one op that stands first

    def dims(self, ref: Ref) -> Dims:
        return self.typed.dims[ref.name, ref.item or 0]

    def index(self, dims: Dims) -> int:
        """Which sequence these dims have."""
        i = self.typed.sequence(dims)
        assert i is not None, "no sequence in these dims"
        return i

    def layout(self, dims: Dims) -> tuple[Size, Size, str, str]:
        i = self.index(dims)
        return chunk_of(i), self.typed.leaves[i].size, self.target.orders[i], self.target.axis

    def along(self, dims: Dims) -> Geometry:
        leaf = self.typed.leaves[self.index(dims)]
        return (*self.sizes.where(dims, leaf), *self.layout(dims))

    def types(self, n: Node) -> tuple[Type | None, ...]:
        """Of the results as they are here."""

        def local(item: int, t: Type | None) -> Type | None:
            if t is None or self.typed.places.get((n.name, item)) not in ("S", "P"):
                return t
            return replace(t, shape=self.sizes.shape(self.typed.dims[n.name, item]))

        return tuple(local(i, t) for i, t in enumerate(n.types))

    def vary_parameters(self) -> None:
        """All replicated parameters that vary, in one op: their gradients are one all-reduce."""
        held = {n.name for n in self.typed.program.nodes if n.op in PLACEHOLDERS}
        nodes = [n for n in self.typed.program.nodes if n.op == VARY and n.args[0].name in held]
        if not nodes:
            return
        self.b.at(replace(nodes[0], name="vary", recompute=0))
        types = tuple(n.type for n in nodes)
        params = tuple(n.args[0] for n in nodes)
        flags = (self.target.reduce, self.target.axis)
        y = self.b.emit(tspc.vary.default, params, *flags, types=types)
        for i, n in enumerate(nodes):
            self.b.instead(Ref(n.name), Ref(y.name, i))
        self.varied = {n.name for n in nodes}

    def node(self, n: Node) -> None:
        self.b.at(n, self.types(n))
        axis, reduce = self.target.axis, self.target.reduce
        if n.op == CONSTANT:
            self.b.end(n.op, **n.kwargs)
        elif n.op == FOLD:
            self.fold(n)
        elif n.op == APART:
            self.apart(n)
        elif n.op in (LOCAL, WHOLE, CLEAR):
            op = getattr(tspc, n.op).default
            self.b.end(op, n.args[0], *self.along(self.dims(Ref(n.name))))
        elif n.op == ALL_REDUCE:
            self.b.end(tspc.all_reduce.default, n.args[0], axis)
        elif n.op == VARY:
            self.b.end(tspc.vary.default, (n.args[0],), reduce, axis)
        elif n.op in (GATHER_WEIGHT, GATHER_WEIGHT + "_r"):
            dim, size = n.kwargs["dim"], int(n.type.shape[n.kwargs["dim"]])
            flags = (n.op == GATHER_WEIGHT, n.type.dtype, reduce, axis)
            self.b.end(tspc.gather_weight.default, n.args[0], dim, size, *flags)
        elif n.op == EMBED:
            layout = self.layout(self.dims(Ref(n.name)))
            flags = (*n.kwargs.values(), n.type.dtype)
            self.b.end(tspc.embed.default, *n.args, *flags, *layout)
        else:
            self.op(n)

    def op(self, n: Node) -> None:
        """One that the model has, or a pass made of it."""
        record, place = self.typed.records.get(n.name), self.typed.places[n.name, 0]
        if n.op == ATTENTION and record is not None and self.exchanges(record):
            self.attention(n, record)
            return
        F, leaves = self.typed.factors, self.typed.leaves
        if place == "S" and record is not None and sequence_ops.runs(F, record, leaves):
            shapes = [self.sizes.shape(d) for d in record.ins]
            sequence_ops.lower(self.b, n, shapes, self.along(self.dims(Ref(n.name))))
            return
        base = record or self.typed.records.get(n.name.removesuffix(".partial"))
        ins = base.ins if base is not None else [self.dims(r) for r in n.refs()]
        outs = (
            base.outs
            if base is not None
            else [self.dims(Ref(n.name, i)) for i in range(len(n.types))]
        )
        local_op.lower(self.b, n, ins, outs, self.sizes if place in ("S", "P") else self.whole)

    def exchanges(self, record: Record) -> bool:
        """The op is cut along the sequence and meets it across ranks."""
        roles = [x for leaf in self.typed.leaves for x in record.roles.get(leaf, ())]
        here = self.typed.places[record.node.name, 0] == "S"
        return here and any(role == "exchange" for role, *_ in roles)

    def attention(self, n: Node, record: Record) -> None:
        x, a = bound(n)
        assert x.sinks is None, "its sinks are in no fold"
        rows, lengths, orders, _ = zip(*(self.layout(d) for d in record.ins[:2]))
        axis = self.target.axis
        self.b.end(tspc.attention.default, *x.all[:6], *a.all, rows, lengths, orders, axis)

    def fold(self, n: Node) -> None:
        fold: Fold = n.kwargs["fold"]
        body = self.target.bodies[fold.name]
        tokens, invariants, sliced, weights = n.args
        sequences = self.typed.sequences_of(fold)
        rows = tuple(chunk_of(i) for i in sequences)
        lengths = tuple(self.typed.leaves[i].size for i in sequences)
        operands = (body.symbols, rows, lengths, fold.name, body.key, self.target.axis)
        inside = (tokens, (*invariants, *sliced), weights)
        types = self.b.types
        summed = (t if e.kind == "sum" else None for e, t in zip(fold.exits, types))
        y = self.b.emit(tspc.fold.default, *inside, *operands, types=tuple(summed))
        for i, e in enumerate(fold.exits):
            x = Ref(y.name, i)
            self.b.at(n, types[i : i + 1])
            if e.kind == "lse":
                x = self.emit(aten.logsumexp.default, x, (0,))
            elif e.kind == "stack":
                x = self.unstack(x, e.dims, fold)
            self.b.instead(Ref(n.name, i), x)

    def emit(self, op: Any, *args: Any) -> Ref:
        """With the types of the node at hand, under another name."""
        return self.b.emit(op, *args, types=self.b.types)

    def unstack(self, x: Ref, dims: Dims, fold: Fold) -> Ref:
        """[D, local with units of one shard] -> local with all units, pads dropped."""
        b, units, count = self.b, fold.units, self.target.bodies[fold.name].ranks
        k, lead, trail = self.sizes.where(dims, fold.factor)
        pads = count * units != fold.size
        if lead == 1:
            x = b.emit(aten.movedim.int, x, 0, k)
            if not pads:
                return self.emit(aten.flatten.using_ints, x, k, k + 1)
            x = b.emit(aten.flatten.using_ints, x, k, k + 1)
            return self.emit(aten.narrow.default, x, k, 0, fold.size * trail)
        shape = self.sizes.shape(dims)
        split = (count, *shape[:k], lead, units, trail, *shape[k + 1 :])
        x = b.emit(aten.movedim.int, b.emit(aten.reshape.default, x, split), 0, k + 1)
        x = b.emit(aten.flatten.using_ints, x, k + 1, k + 2)
        x = b.emit(aten.narrow.default, x, k + 1, 0, fold.size)
        return self.emit(aten.reshape.default, x, shape)

    def apart(self, n: Node) -> None:
        """What a fold's factor does not touch: on this rank's rows, with this rank's own shard.

        The rows without the factor are whole in every shard; their gradients add up over the ranks
        where shards become stored chunks again. Of the others it makes those of one shard, which
        nothing reads.
        """
        fold: Fold = n.kwargs["fold"]
        b, sizes = self.b, replace(self.sizes, cut={**self.sizes.cut, fold.factor: fold.units})
        names = (*fold.tokens, *fold.invariants, *fold.sliced, *map(Ref, fold.weights))
        with b.scope():
            for old, x in zip(names, refs_in(n.args)):
                if old in fold.sliced:
                    x = self.first_units(fold, old, x, sizes)
                elif old.name in fold.casts:
                    x = b.emit(aten.to.dtype, x, fold.casts[old.name])
                b.instead(old, x)
            for m in fold.body:
                record = fold.records[m.name]
                types = local_op.types(m, record.outs, sizes)
                inner = replace(m, name=f"{n.name}.{m.name}", recompute=n.recompute)
                b.at(inner, types)
                local_op.lower(b, inner, record.ins, record.outs, sizes)
                for i in range(len(m.types)):
                    b.instead(Ref(m.name, i), Ref(inner.name, i))
            leaving = [b.use(e.ref) for e in fold.exits]
        for i, x in enumerate(leaving):
            b.instead(Ref(n.name, i), x)

    def first_units(self, fold: Fold, ref: Ref, x: Ref, sizes: Sizes) -> Ref:
        """As many units as a shard has: which ones is of no consequence, and so equal on all
        ranks."""
        for k, d in enumerate(fold.dims[ref]):
            if fold.factor in sizes.factors.leaves(d):
                at = indices(sizes.factors, d, fold.factor, range(fold.units))
                starts = [i for i, a in enumerate(at) if not i or at[i - 1] != a - 1]
                ends = (*starts[1:], len(at))
                runs = [(at[i], j - i) for i, j in zip(starts, ends)]
                parts = tuple(self.b.emit(aten.narrow.default, x, k, *run) for run in runs)
                x = self.b.emit(aten.cat.default, parts, k)  # no table: caches take no constant
        return x

    def output(self, n: Node) -> None:
        self.b.at(n)
        returned = [
            a if not isinstance(a, Ref) else self.result(i, a) for i, a in enumerate(n.args)
        ]
        self.b.end(OUTPUT, *returned)

    def result(self, index: int, a: Ref) -> Ref:
        """As `results` says; no output is an input or a view of one."""
        if self.typed.places[a.name, a.item or 0] != "S":
            node = self.typed.program.node(a.name)
            held = node.op in PLACEHOLDERS or node.is_call and node.op.is_view
            return self.b.emit(aten.clone.default, a) if held else a
        kind = self.kinds[index]
        if kind == "whole":
            return self.b.emit(tspc.whole.default, a, *self.along(self.dims(a)))
        op = aten.detach.default if kind == "deferred" else aten.clone.default
        return self.b.emit(op, a)
