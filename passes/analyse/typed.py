"""A program with conversions: on which ranks each value lives, and along which sequence it is
cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tspc.factors.factor import Dims, Factor, Factors
from tspc.ir.program import Program, Size
from tspc.passes.analyse.factorize import Record
from tspc.passes.analyse.fold import Fold


@dataclass(frozen=True)
class Fallback:
    """An op that runs replicated: what it is, why, where."""

    node: str
    op: str
    why: str
    shape: tuple[Size, ...]
    source: str


@dataclass(frozen=True)
class Typed:
    """A program with conversions; dims and places by (name, item)."""

    program: Program
    factors: Factors
    dims: dict[tuple[str, int], Dims]
    places: dict[tuple[str, int], str]
    records: dict[str, Record]
    leaves: tuple[Factor, ...]  # the factors of the sequences
    fallbacks: tuple[Fallback, ...] = ()

    @property
    def leaf(self) -> Factor | None:
        """The main sequence."""
        return next(iter(self.leaves), None)

    def sequence(self, dims: Dims) -> int | None:
        """Which of the leaves these dims have."""
        return sequence_of(self.factors, self.leaves, dims)

    def sequences_of(self, fold: Fold) -> list[int]:
        """Those of its results first, then in the order of its tokens."""
        all_dims = (*(e.dims for e in fold.exits), *(fold.dims[t] for t in fold.tokens))
        return list(dict.fromkeys(i for d in all_dims if (i := self.sequence(d)) is not None))


def sequence_of(factors: Factors, leaves: Sequence[Factor], dims: Dims) -> int | None:
    """The one of the leaves that the dims have."""
    carried = {f for d in dims for f in factors.leaves(d)}
    return next((i for i, leaf in enumerate(leaves) if leaf in carried), None)
