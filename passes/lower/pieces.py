"""Cut the body of a fold at its exchanges into pieces: nodes on one shard's tensors.

In: a node of a `Fold`, and the placement of its operands. Out: a `Body`. Pads of the units are made
neutral where an op needs it: -inf before a log-sum-exp and zero before a sum that no zero row of a
weight clears (docs/design.md, "Storage and shard maps").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from tspc.factors.factor import Dim, Dims, Factor
from tspc.factors.placement import indices
from tspc.ir.body import STEP, Attention, Body, Extent, Out, Piece, Token, rows_of
from tspc.ir.builder import Builder
from tspc.ir.program import CONSTANT, Node, Ref, Size, Type
from tspc.ops.attention import ATTENTION, bound
from tspc.passes.analyse.factorize import Record
from tspc.passes.analyse.fold import Fold
from tspc.passes.analyse.sizes import Sizes
from tspc.passes.analyse.typed import Typed, sequence_of
from tspc.passes.lower import local_op
from tspc.passes.lower.unit import Unit

aten = torch.ops.aten
PICK = torch.ops.tspc.pick.default
WEIGHTED = (
    aten.linear.default,
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten.addmm.default,
)


def make_body(n: Node, unit: Unit, save: bool) -> Body:
    """The body of a fold node whose operands are converted.

    save: the results of matrix products are kept for the backward, not recomputed.
    """
    fold: Fold = n.kwargs["fold"]
    leaves = tuple(unit.typed.leaves[i] for i in unit.typed.sequences_of(fold))
    extents = tuple(Extent(f.size, unit.choice.leaves[f]) for f in leaves)
    m = _Maker(fold, unit.typed, leaves, unit.ranks)
    tokens, invariants, shards = m.operands(n.args)
    steps = m.steps(save)
    outs = []
    for e in fold.exits:
        k, lead, i = m.where(e.dims)
        outs.append(Out(m.names[e.ref].value, e.kind, k, lead, e.type.requires_grad, i))
    return Body(
        tuple(unit.symbols),
        extents,
        unit.ranks,
        fold.units,
        fold.size,
        steps,
        m.values,
        tuple(tokens),
        tuple(invariants),
        tuple(shards),
        tuple(outs),
        fold.schedule,
        *_products(fold, m.names, m.values, steps),
        unit.hardware,
        unit.options.reduce_dtype,
        fold.name,
    )


@dataclass(frozen=True)
class _Table:
    """dim: the one that carries the factor. rows: its positions that each shard reads."""

    dim: int
    rows: list[list[int]]


@dataclass
class _Maker:
    """A body while it is made. leaves: the factors of its sequences. names: of the values, which
    are canonical. tables: of operands that are read at the units of a shard."""

    fold: Fold
    typed: Typed
    leaves: tuple[Factor, ...]
    ranks: int
    names: dict[Ref, Ref] = field(default_factory=dict)
    values: dict[str, Type] = field(default_factory=dict)
    tables: dict[Ref, _Table] = field(default_factory=dict)

    @cached_property
    def types(self) -> dict[str, tuple[Type | None, ...]]:
        return {n.name: n.types for n in self.typed.program.nodes}

    @cached_property
    def whole(self) -> Sizes:
        """All units, the rows of a step."""
        rows = {f: rows_of(i) for i, f in enumerate(self.leaves)}
        return Sizes(self.typed.factors, rows)

    @cached_property
    def sizes(self) -> Sizes:
        """The units of one shard."""
        return replace(self.whole, cut={**self.whole.cut, self.fold.factor: self.fold.units})

    def sequence(self, dims: Dims) -> int:
        i = sequence_of(self.typed.factors, self.leaves, dims)
        assert i is not None, "no sequence in these dims"
        return i

    def where(self, dims: Dims) -> tuple[int, Size, int]:
        """(dim, lead, which) of the sequence in these dims."""
        i = self.sequence(dims)
        k, lead, _ = self.sizes.where(dims, self.leaves[i])
        return k, lead, i

    def has_units(self, dim: Dim) -> bool:
        return self.fold.factor in self.typed.factors.leaves(dim)

    def operands(self, groups: Sequence[Sequence[Ref]]) -> tuple[list[Token], list[str], list[str]]:
        """Tokens, invariants and shards from (tokens, invariants, sliced, weights) as converted."""
        fold, tokens = self.fold, []
        for old, new in zip(fold.tokens, groups[0]):
            name = self.operand(old, new, "token")
            k, lead, i = self.where(fold.dims[old])
            whole = self.typed.places[new.name, new.item or 0] == "R"
            tokens.append(Token(name, k, lead, whole, i))
            if any(map(self.has_units, fold.dims[old])):
                self.tables[old] = self.table(fold.dims[old])
        pairs = zip((*fold.invariants, *fold.sliced), (*groups[1], *groups[2]))
        invariants = [self.operand(old, new, "invariant") for old, new in pairs]
        self.tables.update({r: self.table(fold.dims[r]) for r in fold.sliced})
        shards = [self.operand(Ref(w), Ref(w), "shard") for w in fold.weights]
        for w, name in zip(fold.weights, shards):
            if w in fold.casts:
                self.values[name] = replace(self.values[name], dtype=fold.casts[w])
        return tokens, invariants, shards

    def operand(self, old: Ref, new: Ref, kind: str) -> str:
        """Registers it; an invariant has the shape that it is given in."""
        name = f"{kind}{sum(v.startswith(kind) for v in self.values)}"
        t = self.types[new.name][new.item or 0]
        assert t is not None
        sizes = self.whole if kind == "token" else self.sizes
        shape = t.shape if kind == "invariant" else sizes.shape(self.fold.dims[old])
        self.values[name] = Type(shape, t.dtype, t.requires_grad)
        self.names[old] = Ref(name)
        return name

    def steps(self, save: bool) -> tuple[Piece | Attention, ...]:
        """Cut where something is exchanged."""
        groups, exchanges = self.levels()
        out: list[Piece | Attention] = []
        for depth in range(max([*groups, *exchanges], default=0) + 1):
            attentions = exchanges.get(depth, [])
            later = [n for d, ns in groups.items() if d > depth for n in ns]
            later += [n for ns in exchanges.values() for n in ns]
            cuts = self.cuts(attentions)
            piece = self.piece(groups.get(depth, []), later, cuts, save)
            if piece.writes:
                out.append(piece)
            out += [self.attention(n, {**self.names, **cuts}) for n in attentions]
        return tuple(out)

    def levels(self) -> tuple[dict[int, list[Node]], dict[int, list[Node]]]:
        """Nodes, and attentions, by how many exchanges their operands have behind them; all get
        their names."""
        level: dict[str, int] = {}
        groups: dict[int, list[Node]] = {}
        exchanges: dict[int, list[Node]] = {}
        for i, n in enumerate(self.fold.body):
            deepest = max((level.get(r.name, 0) for r in n.refs()), default=0)
            exchanged = n.op == ATTENTION
            level[n.name] = deepest + exchanged
            if exchanged or any(Ref(n.name, k) not in self.names for k in range(len(n.types))):
                (exchanges if exchanged else groups).setdefault(deepest, []).append(n)
            record = self.fold.records[n.name]
            for item, t in enumerate(n.types):
                if t is None:
                    continue
                ref = Ref(n.name, item)
                if ref not in self.names:  # else it is made apart
                    self.names[ref] = name = Ref(f"v{i}", item or None)
                    shape = self.sizes.shape(record.outs[item])
                    self.values[name.value] = Type(shape, t.dtype, t.requires_grad)
                if item == 0:
                    self.names[Ref(n.name)] = self.names[ref]
        return groups, exchanges

    def cuts(self, attentions: Sequence[Node]) -> dict[Ref, Ref]:
        """What an exchange reads of an operand without an op between: its units of a shard."""
        out: dict[Ref, Ref] = {}
        for r in (r for n in attentions for r in n.refs() if r in self.tables):
            whole, out[r] = self.names[r].value, Ref(f"{self.names[r].value}_cut")
            shape = self.sizes.shape(self.fold.dims[r])
            self.values[out[r].value] = replace(self.values[whole], shape=shape)
        return out

    def piece(
        self, nodes: Sequence[Node], later: Sequence[Node], cuts: Mapping[Ref, Ref], save: bool
    ) -> Piece:
        names = self.names
        leaving = {names[e.ref].value for e in self.fold.exits}
        results = (Ref(n.name, i) for n in nodes for i, t in enumerate(n.types) if t)
        outputs = {names[r].value for r in results} - {names[r].value for r in self.fold.tokens}
        read_later = {names[r].value for n in later for r in n.refs()} | leaving
        writes = tuple(v for v in self.values if v in outputs and v in read_later)
        read = [r for n in nodes for r in n.refs() if names[r].value not in outputs]
        reads = tuple(dict.fromkeys(names[r].value for r in (*read, *cuts)))
        b = Builder()
        for r in dict.fromkeys((*read, *cuts)):
            if r in self.tables:
                self.units_of(b, names[r], self.tables[r])
        for n in nodes:
            self.lower(b, n)
        saves = self.saves(nodes, leaving) if save else ()
        written = (*writes, *(r.value for r in cuts.values()))
        return Piece(reads, written, tuple(b.nodes), saves)

    def units_of(self, b: Builder, x: Ref, table: _Table) -> None:
        """From here on the operand is read at the units of the shard."""
        t = Type((self.ranks, len(table.rows[0])), torch.int64)
        b.at(Node(f"{x.name}_rows", CONSTANT, types=(t,)))
        rows = b.end(CONSTANT, value=table.rows)
        step = b.emit(aten.reshape.default, Ref(STEP), (1,))
        at = b.emit(aten.reshape.default, b.emit(aten.index_select.default, rows, 0, step), (-1,))
        b.at(Node(f"{x.name}_cut", ""), ())
        b.instead(x, b.end(aten.index_select.default, x, table.dim, at))

    def lower(self, b: Builder, n: Node) -> None:
        """One op of the body, pads of the factor made neutral where it sums over the factor."""
        record, f = self.fold.records[n.name], self.fold.factor
        outs = [self.names[Ref(n.name, i)].value for i, t in enumerate(n.types) if t is not None]
        (name,) = {Ref(o).name.partition("[")[0] for o in outs if o.startswith("v")}
        types = local_op.types(n, record.outs, self.sizes)
        n = replace(n.map_refs(lambda r: self.names[r]), name=name, source="", recompute=0)
        b.at(n, types)
        if n.op == PICK:
            first = b.emit(aten.mul.Tensor, Ref(STEP), self.fold.units)
            b.end(n.op, n.args[0], n.args[1], first)
            return
        roles = {role for role, *_ in record.roles.get(f, ())}
        padded = self.fold.units * self.ranks != self.fold.size
        if padded and roles & {"reduce", "lse"} and n.op not in WEIGHTED:
            x = b.use(n.args[0])
            for k, d in enumerate(record.ins[0]):
                if self.has_units(d):
                    x = self.neutral(b, x, k, record, -math.inf if "lse" in roles else 0.0)
            first = n.args[0]
            n = n.map_refs(lambda r: x if r == first else r)
        local_op.lower(b, n, record.ins, record.outs, self.sizes)

    def neutral(self, b: Builder, x: Ref, k: int, record: Record, fill: float) -> Ref:
        """`fill` in the pad units of dim k."""
        units, dims = self.fold.units, record.ins[0]
        lead, trail = self.sizes.around(dims[k], self.fold.factor)
        shape: list[Size] = [1] * len(dims)
        shape[k] = lead * units * trail
        first = b.emit(aten.mul.Tensor, Ref(STEP), units)
        unit = b.emit(aten.add.Tensor, b.emit(aten.arange.default, units), first)
        real = b.emit(aten.lt.Scalar, unit, self.fold.size)
        real = b.emit(aten.reshape.default, real, (1, -1, 1))
        real = b.emit(aten.expand.default, real, (lead, units, trail))
        real = b.emit(aten.reshape.default, real, tuple(shape))
        return b.emit(aten.where.ScalarOther, real, x, fill)

    def saves(self, nodes: Sequence[Node], leaving: set[str]) -> tuple[str, ...]:
        """Results of matrix products, each of one shard; what leaves the body is not saved
        twice."""
        out = []
        for n in nodes:
            name = self.names[Ref(n.name)].value
            record = self.fold.records[n.name]
            leaves = {f for d in record.outs[0] for f in self.typed.factors.leaves(d)}
            carried = self.fold.factor in leaves and not leaves.isdisjoint(self.leaves)  # or cheap
            wanted = n.op in WEIGHTED and carried and self.values[name].requires_grad
            if wanted and name not in leaving:
                out.append(name)
        return tuple(out)

    def attention(self, n: Node, names: Mapping[Ref, Ref]) -> Attention:
        x, a = bound(n)
        out = names[Ref(n.name)].value
        shape, dtype = self.values[out].shape, self.values[out].dtype
        lse = f"{out}_lse"
        self.values[lse] = Type(shape[:-1], torch.promote_types(dtype, torch.float32), False)
        queries, keys = (self.sequence(d) for d in self.fold.records[n.name].ins[:2])
        return Attention(x.map(lambda r: names[r].value), out, lse, a, queries, keys)

    def table(self, dims: Dims) -> _Table:
        """Pads repeat the last unit."""
        factors, f = self.typed.factors, self.fold.factor
        (k,) = [i for i, d in enumerate(dims) if self.has_units(d)]
        u, size = self.fold.units, self.fold.size
        rows = []
        for j in range(self.ranks):
            piece = [min(j * u + i, size - 1) for i in range(u)]
            rows.append(indices(factors, dims[k], f, piece))
        return _Table(k, rows)


def _products(
    fold: Fold,
    names: Mapping[Ref, Ref],
    values: Mapping[str, Type],
    steps: Sequence[Piece | Attention],
) -> tuple[Size, Size, Size]:
    """(FLOPs, elements of the results that stay inside, FLOPs of saved results) of the matrix
    products of one step."""
    saved = {n for s in steps if isinstance(s, Piece) for n in s.saves}
    flops: Size = 0
    inner: Size = 0
    spared: Size = 0
    leaving = {e.ref.name for e in fold.exits if e.kind == "sum"}
    for n in fold.body:
        if n.op in WEIGHTED:
            left = n.refs()[1] if n.op == aten.addmm.default else n.refs()[0]
            elements = math.prod(values[names[Ref(n.name)].value].shape)
            cost = 2 * elements * values[names[left].value].shape[-1]
            flops += cost
            inner += elements if n.name not in leaving else 0
            spared += cost if names[Ref(n.name)].value in saved else 0
    return flops, inner, spared
