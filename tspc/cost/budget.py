"""`memory_budget`: which regions keep their matrix products for the backward, which make them
again.

In: a budget and what each region would keep, of one rank. The regions that spare the most
computation per byte come first, of equal ones the last; each that still fits keeps its products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from tspc.base.options import Budget, memory_limit
from tspc.ir.body import Body, evaluate, numel, rows_of

Values = Mapping[sympy.Symbol, int]


@dataclass(frozen=True)
class Keeping:
    """The matrix products of a region that its backward wants.

    body: as it keeps them. kept: whether the budget lets it.
    """

    name: str
    body: Body
    kept: bool

    def bytes(self, sizes: Values) -> int:
        """Of one rank, at these values of the symbols."""
        return kept_bytes(self.body, sizes)


def kept_bytes(body: Body, sizes: Values) -> int:
    """What the pieces of a fold keep on one rank, all shards together."""
    values = _values(body, sizes)
    elements = (
        numel(body.values[n].shape, values) * body.values[n].dtype.itemsize
        for p in body.pieces
        for n in p.saves
    )
    return int(body.ranks * sum(elements))


def spared(body: Body, sizes: Values) -> int:
    """FLOPs of one rank's backward that keeping them spares, all shards together."""
    return int(body.ranks * evaluate(body.spared, _values(body, sizes)))


def _values(body: Body, sizes: Values) -> Values:
    rows = {rows_of(i): int(e.rows(body.ranks, sizes)) for i, e in enumerate(body.extents)}
    return {**sizes, **rows}


def choose(
    budget: Budget, regions: Sequence[tuple[str, Body]], sizes: Values
) -> tuple[Keeping, ...]:
    """Which regions keep their matrix products; those without any are left out."""
    regions = [(n, b) for n, b in regions if any(p.saves for p in b.pieces)]
    bytes_of = [kept_bytes(b, sizes) for _, b in regions]
    gain = [spared(b, sizes) / max(n, 1) for (_, b), n in zip(regions, bytes_of)]
    left, kept = memory_limit(budget, sum(bytes_of)), set()
    for i in sorted(range(len(regions)), key=lambda i: (-gain[i], -i)):
        if bytes_of[i] <= left:
            left -= bytes_of[i]
            kept.add(i)
    return tuple(Keeping(n, b, i in kept) for i, (n, b) in enumerate(regions))


def lines(keepings: Sequence[Keeping], sizes: Values) -> list[str]:
    """For people: which regions keep, which make again, with bytes of one rank."""
    out = []
    for title, kept in (("kept for backward", True), ("recomputed in backward", False)):
        named = [(k.name, k.bytes(sizes)) for k in keepings if k.kept == kept]
        if named:
            listed = ", ".join(f"{n} {_size(b)}" for n, b in named)
            out.append(f"{title}: {_size(sum(b for _, b in named))} a rank: {listed}")
    return out


def _size(count: int) -> str:
    for unit, scale in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
