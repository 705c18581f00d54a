"""Cut the body of a fold at its exchanges into pieces, plain functions on one shard's tensors.

In: a `Fold` with the placement of its operands. Out: a `Body`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from tspc.attention import ATTENTION, bound
from tspc.body import BODIES, Attention, Body, Extent, Out, Piece, Token
from tspc.factor import Dims, Factor
from tspc.hardware import Hardware
from tspc.passes.fold import Fold
from tspc.passes.key import structural_key
from tspc.passes.piece import WEIGHTED, Maker, plain, runner
from tspc.passes.typed import Typed
from tspc.placement import indices
from tspc.program import Node, Ref, Size, Type

aten = torch.ops.aten


def make_body(
    fold: Fold,
    typed: Typed,
    operands: tuple[tuple[Ref, ...], ...],
    symbols: Sequence[sympy.Symbol],
    ranks: int,
    orders: Mapping[Factor, str],
    hardware: Hardware,
    save: bool,
    reduce: torch.dtype | None,
) -> Body:
    """The body of a fold node, registered under its structural key.

    operands: (tokens, invariants, sliced, weights) as converted. save: the results of matrix
    products are kept for the backward, not recomputed.
    """
    leaves = tuple(typed.leaves[i] for i in typed.sequences_of(fold))
    extents = tuple(Extent(f.size, orders[f]) for f in leaves)
    names: dict[Ref, str] = {}
    values: dict[str, Type] = {}
    maker = Maker(fold, typed.factors, leaves, names, ranks)
    types = {n.name: n.types for n in typed.program.nodes}

    def register(ref: Ref, dims: Dims, kind: str, local: bool) -> str:
        name = f"{kind}{sum(v.startswith(kind) for v in values)}"
        t = types[ref.name][ref.item or 0]
        assert t is not None
        shape = maker.shape(dims, symbols, kind == "token") if local else t.shape
        values[name] = Type(shape, t.dtype, t.requires_grad)
        return name

    tokens, invariants, shards = [], [], []
    tables: dict[Ref, tuple[int, torch.Tensor]] = {}
    for old, new in zip(fold.tokens, operands[0]):
        whole = typed.places[new.name, new.item or 0] == "R"
        dims = fold.dims[old]
        names[old] = register(new, dims, "token", local=True)
        k, lead, i = _where(maker, dims, symbols)
        tokens.append(Token(names[old], k, lead, whole, i))
        if maker.has_units(dims):
            tables[old] = _table(maker, dims)
    for old, new in zip(fold.invariants, operands[1]):
        names[old] = register(new, fold.dims[old], "invariant", local=False)
        invariants.append(names[old])
    for old, new in zip(fold.sliced, operands[2]):
        names[old] = register(new, fold.dims[old], "invariant", local=False)
        invariants.append(names[old])
        tables[old] = _table(maker, fold.dims[old])
    for w in fold.weights:
        names[Ref(w)] = register(Ref(w), fold.dims[Ref(w)], "shard", local=True)
        if w in fold.casts:
            name = names[Ref(w)]
            values[name] = replace(values[name], dtype=fold.casts[w])
        shards.append(names[Ref(w)])
    steps = _cut(maker, typed, names, values, symbols, tables, save)
    outs = []
    for e in fold.exits:
        name = names[e.ref]
        k, lead, i = _where(maker, e.dims, symbols)
        outs.append(Out(name, e.kind, k, lead, e.type.requires_grad, i))
    key = structural_key(
        fold,
        [(e.length, e.order) for e in extents],
        names,
        values,
        tables,
        symbols,
        (tokens, outs, ranks, fold.schedule, hardware, save, reduce),
    )
    body = BODIES.get(key)
    if body is None:
        body = BODIES[key] = Body(
            key,
            fold.name,
            tuple(symbols),
            extents,
            ranks,
            fold.units,
            fold.size,
            steps,
            values,
            tuple(tokens),
            tuple(invariants),
            tuple(shards),
            tuple(outs),
            fold.schedule,
            *_products(fold, names, values, steps),
            hardware,
            reduce,
        )
    return body


def _products(
    fold: Fold, names: Mapping[Ref, str], values: Mapping[str, Type], steps: Sequence[Any]
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


def _where(m: Maker, dims: Dims, symbols: Sequence[sympy.Symbol]) -> tuple[int, Size, int]:
    """(dim, lead, which) of the sequence in these dims."""
    sizes, i = m.sizes({s: s for s in symbols}), m.sequence(dims)
    leaf = m.leaves[i]
    (k,) = [k for k, d in enumerate(dims) if leaf in m.factors.leaves(d)]
    return k, plain(sizes.around(dims[k], leaf)[0]), i


def _table(m: Maker, dims: Dims) -> tuple[int, torch.Tensor]:
    """The dim that carries the factor and [ranks, n]: its positions that shard j reads; pads
    repeat the last unit."""
    (k,) = [i for i, d in enumerate(dims) if m.fold.factor in m.factors.leaves(d)]
    u, size = m.fold.units, m.fold.size
    rows = []
    for j in range(m.ranks):
        piece = [min(j * u + i, size - 1) for i in range(u)]
        rows.append(indices(m.factors, dims[k], m.fold.factor, piece))
    return k, torch.tensor(rows)


def _cut(
    m: Maker,
    typed: Typed,
    names: dict[Ref, str],
    values: dict[str, Type],
    symbols: Sequence[sympy.Symbol],
    tables: Mapping[Ref, tuple[int, torch.Tensor]],
    save: bool,
) -> tuple[Piece | Attention, ...]:
    """Level of a node: how many exchanges its operands have behind them."""
    level: dict[str, int] = {}
    groups: dict[int, list[Node]] = {}
    exchanges: dict[int, list[Node]] = {}
    for i, n in enumerate(m.fold.body):
        deepest = max((level.get(r.name, 0) for r in n.refs()), default=0)
        if n.op == ATTENTION:
            exchanges.setdefault(deepest, []).append(n)
            level[n.name] = deepest + 1
        else:
            groups.setdefault(deepest, []).append(n)
            level[n.name] = deepest
        record = m.fold.records[n.name]
        for item, t in enumerate(n.types):
            if t is None:
                continue
            made_apart = names.get(Ref(n.name, item))
            name = made_apart or f"v{i}_{item}"
            names[Ref(n.name, item)] = name
            if item == 0:
                names[Ref(n.name)] = name
            if made_apart:
                continue
            shape = m.shape(record.outs[item], symbols, False)
            values[name] = Type(shape, t.dtype, t.requires_grad)
    wanted = {names[e.ref] for e in m.fold.exits}
    steps: list[Piece | Attention] = []
    for depth in range(max([*groups, *exchanges], default=0) + 1):
        nodes = groups.get(depth, [])
        outputs = {names[Ref(n.name, i)] for n in nodes for i, t in enumerate(n.types) if t}
        outputs -= {names[r] for r in m.fold.tokens}
        later = [n for d, ns in groups.items() if d > depth for n in ns]
        later += [n for ns in exchanges.values() for n in ns]
        read_later = {names[r] for n in later for r in n.refs()} | wanted
        writes = tuple(v for v in values if v in outputs and v in read_later)
        reads = tuple(
            dict.fromkeys(names[r] for n in nodes for r in n.refs() if names[r] not in outputs)
        )
        cuts = {}  # what an exchange reads of an operand without an op between
        for n in exchanges.get(depth, []):
            for r in (r for r in n.refs() if r in tables):
                whole, cut = names[r], f"{names[r]}_cut"
                shape = m.shape(m.fold.dims[r], symbols, False)
                cuts[r], values[cut] = cut, replace(values[whole], shape=shape)
        reads = tuple(dict.fromkeys((*reads, *(names[r] for r in cuts))))
        writes = (*writes, *cuts.values())
        if writes:
            saves = (
                _saves(m, nodes, names, values, {names[e.ref] for e in m.fold.exits})
                if save
                else ()
            )
            copies = {names[r]: cut for r, cut in cuts.items()}
            steps.append(Piece(reads, writes, runner(m, nodes, names, tables, copies), saves))
        for n in exchanges.get(depth, []):
            sequences = [m.sequence(d) for d in m.fold.records[n.name].ins[:2]]
            steps.append(_attention(n, {**names, **cuts}, values, *sequences))
    return tuple(steps)


def _saves(
    m: Maker,
    nodes: Sequence[Node],
    names: Mapping[Ref, str],
    values: Mapping[str, Type],
    leaving: set[str],
) -> tuple[str, ...]:
    """Results of matrix products, each of one shard; what leaves the body is not saved twice."""
    out = []
    for n in nodes:
        name = names[Ref(n.name)]
        record = m.fold.records[n.name]
        leaves = {f for d in record.outs[0] for f in m.factors.leaves(d)}
        carried = m.fold.factor in leaves and not leaves.isdisjoint(m.leaves)  # else cheap
        if n.op in WEIGHTED and carried and values[name].requires_grad and name not in leaving:
            out.append(name)
    return tuple(out)


def _attention(
    n: Node, names: Mapping[Ref, str], values: dict[str, Type], queries: int, keys: int
) -> Attention:
    """queries, keys: their sequences."""
    x, a = bound(n)
    out = names[Ref(n.name)]
    shape, dtype = values[out].shape, values[out].dtype
    lse = f"{out}_lse"
    values[lse] = Type(shape[:-1], torch.promote_types(dtype, torch.float32), False)
    return Attention(x.map(lambda r: names[r]), out, lse, a, queries, keys)
