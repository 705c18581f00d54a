"""Which positions of a dim belong to a piece of a factor: shard maps, tables and checks are made
of this."""

from __future__ import annotations

from collections.abc import Sequence

from tspc.factors.factor import Factor, Factors


def indices(factors: Factors, dim: Sequence[Factor], f: Factor, piece: Sequence[int]) -> list[int]:
    """Positions of a dim (constant sizes) at which `f` is in `piece`, in the order of `piece`."""
    out = [0]
    for g in factors.expand(tuple(dim)):
        if g is f:
            places, n = list(piece), int(g.size)
        elif g.cat:
            places, n = [], 0
            for d in factors.flat(g.cat):
                places += [n + i for i in indices(factors, d, f, piece)]
                n += int(factors.size(d))
        else:
            n = int(g.size)
            places = list(range(n))
        out = [a * n + b for a in out for b in places]
    return out
