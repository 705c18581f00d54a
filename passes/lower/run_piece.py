"""One piece of a body: a plain function on one shard's tensors.

Pads of the units are made neutral where the op needs it: -inf before a log-sum-exp and zero before
a sum that no zero row of a weight clears (docs/design.md, "Storage and shard maps").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy
import torch

from tspc.base.context import Context
from tspc.factors.factor import Dim, Dims, Factor, Factors
from tspc.ir.body import Named, Run, rows_of
from tspc.ir.program import Node, Ref, Size
from tspc.passes.analyse.factorize import Record
from tspc.passes.analyse.fold import Fold
from tspc.passes.analyse.sizes import Length, Sizes
from tspc.passes.analyse.typed import sequence_of
from tspc.passes.lower.run_op import Get, Results, call
from tspc.seams.tensors import no_modes

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
class Maker:
    """What the pieces of one fold are made with."""

    fold: Fold
    factors: Factors
    leaves: tuple[Factor, ...]  # its sequences
    names: dict[Ref, str]  # canonical ones of values
    ranks: int

    def sizes(self, symbols: Mapping[sympy.Symbol, Length]) -> Sizes:
        """symbols: rows of the sequences among them."""
        return Sizes(
            self.factors, symbols, self.rows(symbols) | {self.fold.factor: self.fold.units}
        )

    def rows(self, symbols: Mapping[sympy.Symbol, Length]) -> dict[Factor, Length]:
        return {f: symbols.get(rows_of(i), rows_of(i)) for i, f in enumerate(self.leaves)}

    def sequence(self, dims: Dims) -> int:
        i = sequence_of(self.factors, self.leaves, dims)
        assert i is not None, "no sequence in these dims"
        return i

    def shape(self, dims: Dims, symbols: Sequence[sympy.Symbol], all_units: bool) -> tuple:
        same = {s: s for s in symbols}
        whole = Sizes(self.factors, same, self.rows(same))
        sizes = whole if all_units else self.sizes(same)
        return tuple(plain(sizes.dim(d)) for d in dims)

    def has_units(self, dims: Dims) -> bool:
        return any(self.fold.factor in self.factors.leaves(tuple(d)) for d in dims)


@dataclass(frozen=True)
class Table:
    """dim: the one that carries the factor. rows: its positions that each shard reads."""

    dim: int
    rows: list[list[int]]

    @cached_property
    def tensor(self) -> torch.Tensor:
        """int64[ranks, n], a constant of what is traced."""
        with no_modes():
            return torch.tensor(self.rows)


def plain(n: Size) -> Size:
    return int(n) if isinstance(n, sympy.Integer) else n


class _Kept(torch.autograd.Function):
    """A saved value in the place of the one recomputed; the gradient goes on to what made it."""

    @staticmethod
    def forward(ctx: Context, kept: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Context, *gs: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gs[0]


def runner(
    m: Maker,
    nodes: Sequence[Node],
    tables: Mapping[Ref, Table],
    copies: Mapping[str, str],
) -> Run:
    """copies: operand -> the name that its units of shard j are written under."""
    names, sliced = m.names, {m.names[r]: t for r, t in tables.items()}

    def run(
        symbols: Mapping[sympy.Symbol, Length],
        step: torch.Tensor,
        operands: Named,
        kept: Named,
    ) -> Named:
        sizes = m.sizes(symbols)
        env = dict(operands)
        for name, table in sliced.items():
            if name in env:
                at = table.tensor.to(step.device).index_select(0, step.view(1)).view(-1)
                env[name] = env[name].index_select(table.dim, at)
        env.update({cut: env[name] for name, cut in copies.items()})
        for n in nodes:
            record = m.fold.records[n.name]
            result = _one(m, n, record, sizes, step, lambda r: env[names[r]])
            for item, value in enumerate(result if isinstance(result, (list, tuple)) else [result]):
                name = names[Ref(n.name, item)]
                if name not in operands:  # else it is made apart
                    env[name] = _Kept.apply(kept[name], value) if name in kept else value
        return env

    return run


def _one(m: Maker, n: Node, record: Record, sizes: Sizes, step: torch.Tensor, get: Get) -> Results:
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

        def fetch(r: Ref) -> torch.Tensor:
            return cleared if r == first else get(r)

        return call(n, record.ins, record.outs, sizes, fetch)
    return call(n, record.ins, record.outs, sizes, get)


def _neutral(
    m: Maker, x: torch.Tensor, k: int, dim: Dim, sizes: Sizes, step: torch.Tensor, fill: float
) -> torch.Tensor:
    """`fill` in the pad units of dim k."""
    lead, trail = sizes.around(dim, m.fold.factor)
    unit = torch.arange(m.fold.units, device=x.device) + step * m.fold.units
    real = (unit < m.fold.size).view(1, -1, 1).expand(lead, m.fold.units, trail).reshape(-1)
    shape = [1] * x.dim()
    shape[k] = real.shape[0]
    return torch.where(real.view(shape), x, fill)
