"""Cut the body of a fold at its exchanges into pieces, plain functions on one shard's tensors.

In: a node of a `Fold`, and the placement of its operands. Out: a `Body`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import sympy
import torch

from tspc.factors.factor import Dims
from tspc.factors.placement import indices
from tspc.ir.body import Attention, Body, Extent, Out, Piece, Token
from tspc.ir.program import Node, Ref, Size, Type
from tspc.ops.attention import ATTENTION, bound
from tspc.passes.analyse.fold import Fold
from tspc.passes.analyse.typed import Typed
from tspc.passes.lower.body_key import structural_key
from tspc.passes.lower.run_piece import WEIGHTED, Maker, Table, plain, runner
from tspc.passes.lower.unit import Unit

aten = torch.ops.aten


def make_body(n: Node, unit: Unit, save: bool) -> Body:
    """The body of a fold node whose operands are converted, under its structural key.

    save: the results of matrix products are kept for the backward, not recomputed.
    """
    fold: Fold = n.kwargs["fold"]
    orders, hardware, reduce = unit.choice.leaves, unit.hardware, unit.options.reduce_dtype
    leaves = tuple(unit.typed.leaves[i] for i in unit.typed.sequences_of(fold))
    extents = tuple(Extent(f.size, orders[f]) for f in leaves)
    b = _Builder(Maker(fold, unit.typed.factors, leaves, {}, unit.ranks), unit.typed, unit.symbols)
    tokens, invariants, shards = b.operands(n.args)
    steps = b.steps(save)
    outs = []
    for e in fold.exits:
        k, lead, i = b.where(e.dims)
        outs.append(Out(b.names[e.ref], e.kind, k, lead, e.type.requires_grad, i))
    key = structural_key(
        fold,
        [(e.length, e.order) for e in extents],
        b.names,
        b.values,
        b.tables,
        b.symbols,
        (tokens, outs, unit.ranks, fold.schedule, hardware, save, reduce),
    )
    return Body(
        key,
        fold.name,
        tuple(b.symbols),
        extents,
        unit.ranks,
        fold.units,
        fold.size,
        steps,
        b.values,
        tuple(tokens),
        tuple(invariants),
        tuple(shards),
        tuple(outs),
        fold.schedule,
        *_products(fold, b.names, b.values, steps),
        hardware,
        reduce,
    )


@dataclass
class _Builder:
    """A body while it is made. tables: what is read at the units of a shard."""

    maker: Maker
    typed: Typed
    symbols: Sequence[sympy.Symbol]
    values: dict[str, Type] = field(default_factory=dict)
    tables: dict[Ref, Table] = field(default_factory=dict)

    @cached_property
    def types(self) -> dict[str, tuple[Type | None, ...]]:
        return {n.name: n.types for n in self.typed.program.nodes}

    @property
    def names(self) -> dict[Ref, str]:
        return self.maker.names

    def operands(self, groups: Sequence[Sequence[Ref]]) -> tuple[list[Token], list[str], list[str]]:
        """Tokens, invariants and shards from (tokens, invariants, sliced, weights) as converted."""
        fold, tokens = self.maker.fold, []
        for old, new in zip(fold.tokens, groups[0]):
            name = self.operand(old, new, "token")
            k, lead, i = self.where(fold.dims[old])
            whole = self.typed.places[new.name, new.item or 0] == "R"
            tokens.append(Token(name, k, lead, whole, i))
            if self.maker.has_units(fold.dims[old]):
                self.tables[old] = _table(self.maker, fold.dims[old])
        pairs = zip((*fold.invariants, *fold.sliced), (*groups[1], *groups[2]))
        invariants = [self.operand(old, new, "invariant") for old, new in pairs]
        self.tables.update({r: _table(self.maker, fold.dims[r]) for r in fold.sliced})
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
        local = kind != "invariant"
        shape = self.shape(self.maker.fold.dims[old], kind == "token") if local else t.shape
        self.values[name] = Type(shape, t.dtype, t.requires_grad)
        self.names[old] = name
        return name

    def shape(self, dims: Dims, all_units: bool = False) -> tuple:
        return self.maker.shape(dims, self.symbols, all_units)

    def where(self, dims: Dims) -> tuple[int, Size, int]:
        """(dim, lead, which) of the sequence in these dims."""
        m = self.maker
        sizes, i = m.sizes({s: s for s in self.symbols}), m.sequence(dims)
        leaf = m.leaves[i]
        (k,) = [k for k, d in enumerate(dims) if leaf in m.factors.leaves(d)]
        return k, plain(sizes.around(dims[k], leaf)[0]), i

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
        for i, n in enumerate(self.maker.fold.body):
            deepest = max((level.get(r.name, 0) for r in n.refs()), default=0)
            exchanged = n.op == ATTENTION
            (exchanges if exchanged else groups).setdefault(deepest, []).append(n)
            level[n.name] = deepest + exchanged
            record = self.maker.fold.records[n.name]
            for item, t in enumerate(n.types):
                if t is None:
                    continue
                made_apart = self.names.get(Ref(n.name, item))
                name = made_apart or f"v{i}_{item}"
                self.names[Ref(n.name, item)] = name
                if item == 0:
                    self.names[Ref(n.name)] = name
                if not made_apart:
                    shape = self.shape(record.outs[item])
                    self.values[name] = Type(shape, t.dtype, t.requires_grad)
        return groups, exchanges

    def cuts(self, attentions: Sequence[Node]) -> dict[Ref, str]:
        """What an exchange reads of an operand without an op between."""
        out: dict[Ref, str] = {}
        for r in (r for n in attentions for r in n.refs() if r in self.tables):
            whole, out[r] = self.names[r], f"{self.names[r]}_cut"
            shape = self.shape(self.maker.fold.dims[r])
            self.values[out[r]] = replace(self.values[whole], shape=shape)
        return out

    def piece(
        self, nodes: Sequence[Node], later: Sequence[Node], cuts: Mapping[Ref, str], save: bool
    ) -> Piece:
        m, names = self.maker, self.names
        leaving = {names[e.ref] for e in m.fold.exits}
        outputs = {names[Ref(n.name, i)] for n in nodes for i, t in enumerate(n.types) if t}
        outputs -= {names[r] for r in m.fold.tokens}
        read_later = {names[r] for n in later for r in n.refs()} | leaving
        writes = tuple(v for v in self.values if v in outputs and v in read_later)
        reads = [names[r] for n in nodes for r in n.refs() if names[r] not in outputs]
        reads = tuple(dict.fromkeys((*reads, *(names[r] for r in cuts))))
        copies = {names[r]: cut for r, cut in cuts.items()}
        run = runner(m, nodes, self.tables, copies)
        saves = self.saves(nodes, leaving) if save else ()
        return Piece(reads, (*writes, *cuts.values()), run, saves)

    def saves(self, nodes: Sequence[Node], leaving: set[str]) -> tuple[str, ...]:
        """Results of matrix products, each of one shard; what leaves the body is not saved
        twice."""
        m, out = self.maker, []
        for n in nodes:
            name = self.names[Ref(n.name)]
            record = m.fold.records[n.name]
            leaves = {f for d in record.outs[0] for f in m.factors.leaves(d)}
            carried = m.fold.factor in leaves and not leaves.isdisjoint(m.leaves)  # else cheap
            wanted = n.op in WEIGHTED and carried and self.values[name].requires_grad
            if wanted and name not in leaving:
                out.append(name)
        return tuple(out)

    def attention(self, n: Node, names: Mapping[Ref, str]) -> Attention:
        x, a = bound(n)
        out = names[Ref(n.name)]
        shape, dtype = self.values[out].shape, self.values[out].dtype
        lse = f"{out}_lse"
        self.values[lse] = Type(shape[:-1], torch.promote_types(dtype, torch.float32), False)
        queries, keys = (self.maker.sequence(d) for d in self.maker.fold.records[n.name].ins[:2])
        return Attention(x.map(lambda r: names[r]), out, lse, a, queries, keys)


def _products(
    fold: Fold,
    names: Mapping[Ref, str],
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
            elements = math.prod(values[names[Ref(n.name)]].shape)
            cost = 2 * elements * values[names[left]].shape[-1]
            flops += cost
            inner += elements if n.name not in leaving else 0
            spared += cost if names[Ref(n.name)] in saved else 0
    return flops, inner, spared


def _table(m: Maker, dims: Dims) -> Table:
    """Pads repeat the last unit."""
    (k,) = [i for i, d in enumerate(dims) if m.fold.factor in m.factors.leaves(d)]
    u, size = m.fold.units, m.fold.size
    rows = []
    for j in range(m.ranks):
        piece = [min(j * u + i, size - 1) for i in range(u)]
        rows.append(indices(m.factors, dims[k], m.fold.factor, piece))
    return Table(k, rows)
