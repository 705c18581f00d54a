"""Cut the body of a fold at its exchanges into pieces, plain functions on one shard's tensors.

In: a `Fold` with the placement of its operands. Out: a `Body`. Pads of the factor are neutral: the
logits of pad units are
-inf before a log-sum-exp and zero before a sum that no zero row of a weight clears (DESIGN section
7).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from tspc.passes.fold import Fold
from tspc.passes.key import structural_key
from tspc.passes.localize import call
from tspc.passes.propagate import Typed
from tspc.passes.sizes import Sizes

from tspc.body import BODIES, ROWS, Attention, Body, Out, Piece, Token, Value
from tspc.counter import ATTENTIONS, DROPOUT_ATTENTION
from tspc.factor import Factor, Factors
from tspc.hardware import Hardware
from tspc.placement import indices
from tspc.program import Node, Ref

aten = torch.ops.aten
PICK = torch.ops.tspc.pick.default
WEIGHTED = (
    aten.linear.default,
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten.addmm.default,
)


@dataclass(frozen=True)
class _Maker:
    fold: Fold
    factors: Factors
    leaf: Factor
    canonical: Mapping[Ref, str]
    ranks: int

    def sizes(self, symbols: Mapping[sympy.Symbol, Any], rows: Any) -> Sizes:
        return Sizes(self.factors, symbols, {self.leaf: rows, self.fold.factor: self.fold.units})

    def shape(
        self, dims: Sequence[Sequence[Factor]], symbols: Sequence[sympy.Symbol], all_units: bool
    ) -> tuple:
        same = {s: s for s in symbols}
        whole = Sizes(self.factors, same, {self.leaf: ROWS})
        sizes = whole if all_units else self.sizes(same, ROWS)
        return tuple(_plain(sizes.dim(d)) for d in dims)

    def has_units(self, dims: Sequence[Sequence[Factor]]) -> bool:
        return any(self.fold.factor in self.factors.leaves(tuple(d)) for d in dims)


def _plain(n: Any) -> Any:
    return int(n) if isinstance(n, sympy.Integer) else n


def make_body(
    fold: Fold,
    typed: Typed,
    operands: tuple[tuple[Ref, ...], ...],
    symbols: Sequence[sympy.Symbol],
    ranks: int,
    order: str,
    hardware: Hardware,
    save: bool,
    reduce: torch.dtype | None,
) -> Body:
    """Operands: (tokens, invariants, sliced, weights) as converted.

    save: the results of matrix products are kept for the backward, not made again.

    Registers the body under its structural key.
    """
    assert typed.leaf is not None
    names: dict[Ref, str] = {}
    values: dict[str, Value] = {}
    maker = _Maker(fold, typed.factors, typed.leaf, names, ranks)
    types = {n.name: n.types for n in typed.program.nodes}

    def known(ref: Ref, dims: Any, kind: str, local: bool) -> str:
        name = f"{kind}{sum(v.startswith(kind) for v in values)}"
        t = types[ref.name][ref.item or 0]
        assert t is not None
        shape = maker.shape(dims, symbols, kind == "token") if local else t.shape
        values[name] = Value(shape, t.dtype, t.requires_grad)
        return name

    tokens, invariants, shards = [], [], []
    tables: dict[Ref, tuple[int, torch.Tensor]] = {}
    for old, new in zip(fold.tokens, operands[0]):
        whole = typed.places[new.name, new.item or 0] == "R"
        dims = fold.dims[old]
        names[old] = known(new, dims, "token", local=True)
        k, lead = _where(maker, dims, symbols)
        tokens.append(Token(names[old], k, lead, whole))
        if maker.has_units(dims):
            tables[old] = _table(maker, dims)
    for old, new in zip(fold.invariants, operands[1]):
        names[old] = known(new, fold.dims[old], "invariant", local=False)
        invariants.append(names[old])
    for old, new in zip(fold.sliced, operands[2]):
        names[old] = known(new, fold.dims[old], "invariant", local=False)
        invariants.append(names[old])
        tables[old] = _table(maker, fold.dims[old])
    for w in fold.weights:
        names[Ref(w)] = known(Ref(w), fold.dims[Ref(w)], "shard", local=True)
        if w in fold.casts:
            name = names[Ref(w)]
            values[name] = replace(values[name], dtype=fold.casts[w])
        shards.append(names[Ref(w)])
    steps = _cut(maker, typed, names, values, symbols, tables, save)
    outs = []
    for e in fold.exits:
        name = names[e.ref]
        k, lead = _where(maker, e.dims, symbols)
        outs.append(Out(name, e.kind, k, lead, e.type.requires_grad))
    key = structural_key(
        fold,
        maker.leaf.size,
        names,
        values,
        tables,
        symbols,
        (tokens, outs, ranks, order, fold.schedule, hardware, save, reduce),
    )
    if key not in BODIES:
        BODIES[key] = Body(
            key,
            fold.name,
            tuple(symbols),
            maker.leaf.size,
            ranks,
            order,
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
    return BODIES[key]


def _products(
    fold: Fold, names: Mapping[Ref, str], values: Mapping[str, Value], steps: Sequence[Any]
) -> tuple[Any, Any, Any]:
    """(FLOPs, elements of the results that stay inside, FLOPs of saved results) of the matrix
    products of one step."""
    saved = {n for s in steps if isinstance(s, Piece) for n in s.saves}
    flops: Any = 0
    inner: Any = 0
    spared: Any = 0
    leaving = {e.ref.name for e in fold.exits if e.kind == "sum"}
    for n in fold.body:
        if n.op in WEIGHTED:
            left = n.refs()[1] if n.op == aten.addmm.default else n.refs()[0]
            made = math.prod(values[names[Ref(n.name)]].shape)
            mine = 2 * made * values[names[left]].shape[-1]
            flops += mine
            inner += made if n.name not in leaving else 0
            spared += mine if names[Ref(n.name)] in saved else 0
    return flops, inner, spared


def _where(m: _Maker, dims: Any, symbols: Sequence[sympy.Symbol]) -> tuple[int, Any]:
    """(dim, lead) of the sequence in these dims."""
    sizes = m.sizes({s: s for s in symbols}, ROWS)
    for k, d in enumerate(dims):
        if m.leaf in m.factors.leaves(d):
            return k, _plain(sizes.around(d, m.leaf)[0])
    raise AssertionError("no sequence in a token")


def _table(m: _Maker, dims: Any) -> tuple[int, torch.Tensor]:
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
    m: _Maker,
    typed: Typed,
    names: dict[Ref, str],
    values: dict[str, Value],
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
        if n.op in ATTENTIONS:
            exchanges.setdefault(deepest, []).append(n)
            level[n.name] = deepest + 1
        else:
            groups.setdefault(deepest, []).append(n)
            level[n.name] = deepest
        record = m.fold.records[n.name]
        for item, t in enumerate(n.types):
            if t is None:
                continue
            name = f"v{i}_{item}"
            names[Ref(n.name, item)] = name
            if item == 0:
                names[Ref(n.name)] = name
            shape = m.shape(record.outs[item], symbols, False)
            values[name] = Value(shape, t.dtype, t.requires_grad)
    wanted = {names[e.ref] for e in m.fold.exits}
    steps: list[Piece | Attention] = []
    for depth in range(max([*groups, *exchanges], default=0) + 1):
        nodes = groups.get(depth, [])
        made = {names[Ref(n.name, i)] for n in nodes for i, t in enumerate(n.types) if t}
        later = [n for d, ns in groups.items() if d > depth for n in ns]
        later += [n for ns in exchanges.values() for n in ns]
        read_later = {names[r] for n in later for r in n.refs()} | wanted
        writes = tuple(v for v in values if v in made and v in read_later)
        reads = tuple(
            dict.fromkeys(names[r] for n in nodes for r in n.refs() if names[r] not in made)
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
            steps.append(Piece(reads, writes, _runner(m, nodes, names, tables, copies), saves))
        for n in exchanges.get(depth, []):
            steps.append(_attention(n, {**names, **cuts}, values))
    return tuple(steps)


def _saves(
    m: _Maker,
    nodes: Sequence[Node],
    names: Mapping[Ref, str],
    values: Mapping[str, Value],
    leaving: set[str],
) -> tuple[str, ...]:
    """Results of matrix products, each of one shard; what leaves the body is not saved twice."""
    out = []
    for n in nodes:
        name = names[Ref(n.name)]
        record = m.fold.records[n.name]
        carried = any(m.fold.factor in m.factors.leaves(d) for d in record.outs[0])
        if n.op in WEIGHTED and carried and values[name].requires_grad and name not in leaving:
            out.append(name)
    return tuple(out)


class _Kept(torch.autograd.Function):
    """A saved value in the place of the one made again; the gradient goes on to what made it."""

    @staticmethod
    def forward(ctx: Any, kept: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return None, g


def _attention(n: Node, names: Mapping[Ref, str], values: dict[str, Value]) -> Attention:
    bound = _bind(n)
    out = names[Ref(n.name)]
    shape, dtype = values[out].shape, values[out].dtype
    lse = f"{out}_lse"
    values[lse] = Value(shape[:-1], torch.promote_types(dtype, torch.float32), False)
    mask = names[bound["attn_mask"]] if bound["attn_mask"] is not None else None
    q, k, v = (names[bound[x]] for x in ("query", "key", "value"))
    scale = bound["scale"]
    if scale is None:
        scale = float(values[q].shape[-1]) ** -0.5
    states = names[bound["states"]] if n.op == DROPOUT_ATTENTION else None
    p, sinks = float(bound["dropout_p"]), bound.get("sinks")
    sinks = names[sinks] if sinks is not None else None
    return Attention(
        q, k, v, mask, out, lse, bool(bound["is_causal"]), float(scale), states, p, sinks
    )


def _bind(n: Node) -> dict[str, Any]:
    spec = n.op._schema.arguments
    return {
        a.name: n.args[i]
        if i < len(n.args)
        else n.kwargs.get(a.name, a.default_value if a.has_default_value() else None)
        for i, a in enumerate(spec)
    }


def _runner(
    m: _Maker,
    nodes: Sequence[Node],
    names: Mapping[Ref, str],
    tables: Mapping[Ref, tuple[int, torch.Tensor]],
    copies: Mapping[str, str],
) -> Callable[..., dict[str, Any]]:
    """copies: operand -> the name that its units of shard j are written under."""
    sliced = {names[r]: t for r, t in tables.items()}

    def run(
        symbols: Mapping[sympy.Symbol, Any],
        step: torch.Tensor,
        given: dict[str, torch.Tensor],
        kept: dict[str, torch.Tensor],
    ) -> dict[str, Any]:
        sizes = m.sizes(symbols, symbols[ROWS])
        env = dict(given)
        for name, (k, table) in sliced.items():
            if name in env:
                at = table.to(step.device).index_select(0, step.view(1)).view(-1)
                env[name] = env[name].index_select(k, at)
        env.update({cut: env[name] for name, cut in copies.items()})
        for n in nodes:
            record = m.fold.records[n.name]
            result = _one(m, n, record, sizes, step, lambda r: env[names[r]])
            for item, value in enumerate(result if isinstance(result, (list, tuple)) else [result]):
                name = names[Ref(n.name, item)]
                env[name] = _Kept.apply(kept[name], value) if name in kept else value
        return env

    return run


def _one(
    m: _Maker, n: Node, record: Any, sizes: Sizes, step: torch.Tensor, get: Callable[[Ref], Any]
) -> Any:
    """One op of the body, pads of the factor made neutral where it sums over the factor."""
    f = m.fold.factor
    if n.op == PICK:
        logits, labels = get(n.args[0]), get(n.args[1])
        return n.op(logits, labels, step * m.fold.units)
    roles = {role for role, *_ in record.roles.get(f, ())}
    padded = m.fold.units * m.ranks != m.fold.size
    if padded and roles & {"reduce", "lse"} and n.op not in WEIGHTED:
        fill = -torch.inf if "lse" in roles else 0.0
        first = n.args[0]
        x = get(first)
        for k, d in enumerate(record.ins[0]):
            if f in m.factors.leaves(d):
                x = _neutral(m, x, k, d, sizes, step, fill)
        cleared = x

        def fetch(r: Ref) -> Any:
            return cleared if r == first else get(r)

        return call(n, record.ins, record.outs, sizes, fetch)
    return call(n, record.ins, record.outs, sizes, get)


def _neutral(
    m: _Maker, x: torch.Tensor, k: int, dim: Any, sizes: Sizes, step: torch.Tensor, fill: float
) -> torch.Tensor:
    """`fill` in the pad units of dim k."""
    lead, trail = sizes.around(dim, m.fold.factor)
    unit = torch.arange(m.fold.units, device=x.device) + step * m.fold.units
    real = (unit < m.fold.size).view(1, -1, 1).expand(lead, m.fold.units, trail).reshape(-1)
    shape = [1] * x.dim()
    shape[k] = real.shape[0]
    return torch.where(real.view(shape), x, fill)
