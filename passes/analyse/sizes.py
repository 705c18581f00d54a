"""Sizes of dims on one rank: those of cut factors are local ones, all others the global ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from tspc.factors.factor import Dims, Factor, Factors, norm
from tspc.ir.program import Size


@dataclass(frozen=True)
class Sizes:
    """cut: factors -> their local sizes."""

    factors: Factors
    cut: Mapping[Factor, Size]

    def leaf(self, f: Factor) -> Size:
        """Of one resolved factor."""
        if f in self.cut:
            return self.cut[f]
        return sum(self.dim(d) for d in self.factors.flat(f.cat)) if f.cat else f.size

    def dim(self, dim: Sequence[Factor]) -> Size:
        """The local size of a dim."""
        return norm(math.prod(self.leaf(f) for f in self.factors.expand(tuple(dim))))

    def shape(self, dims: Dims) -> tuple[Size, ...]:
        return tuple(self.dim(d) for d in dims)

    def is_cut(self, dim: Sequence[Factor]) -> bool:
        return any(f in self.cut for f in self.factors.leaves(tuple(dim)))

    def around(self, dim: Sequence[Factor], f: Factor) -> tuple[Size, Size]:
        """(lead, trail): local sizes of what is major and minor of `f` in a dim that is a plain
        product."""
        leaves = self.factors.expand(tuple(dim))
        at = leaves.index(f)
        return self.dim(leaves[:at]), self.dim(leaves[at + 1 :])

    def where(self, dims: Dims, leaf: Factor) -> tuple[int, Size, Size]:
        """(dim, lead, trail) of a sequence, or of another factor."""
        for k, d in enumerate(dims):
            if leaf in self.factors.leaves(tuple(d)):
                return (k, *self.around(d, leaf))
        raise AssertionError("the factor is not in these dims")

    def before(self, dim: Sequence[Factor], start: Size) -> Size:
        """Local elements of a dim before global element `start`, which lies on a segment
        bound."""
        leaves = self.factors.expand(tuple(dim))
        if not start or not leaves or not leaves[0].cat:
            return start
        others = tuple(leaves[1:])
        minor, at, local = self.factors.size(others), 0, 0
        for segment in self.factors.flat(leaves[0].cat):
            if _equal(at, start):
                break
            at += self.factors.size(segment) * minor
            local += self.dim((*segment, *others))
        assert _equal(at, start), f"a slice from {start} falls inside of a segment"
        return norm(local)


def _equal(a: Size, b: Size) -> bool:
    return a == b or sympy.expand(a - b) == 0
