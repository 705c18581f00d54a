"""Local sizes of dims: global symbols and the local sizes of cut factors -> ints or SymInts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch.types import IntLikeType

from tspc.factors.factor import Dims, Factor, Factors
from tspc.ir.program import Size
from tspc.seams.sizes import PythonReferenceAnalysis, sympy_interp

Length = IntLikeType | sympy.Basic  # of a run, or symbolic


@dataclass(frozen=True)
class Sizes:
    """Local sizes: symbols -> values (ints or SymInts), cut factors -> local size."""

    factors: Factors
    symbols: Mapping[sympy.Symbol, Length]
    cut: Mapping[Factor, Length]

    def value(self, size: Size) -> Any:
        """A global size."""
        if not isinstance(size, sympy.Expr):
            return size
        if not size.free_symbols:
            return int(size) if size.is_integer else float(size)
        return sympy_interp(PythonReferenceAnalysis, dict(self.symbols), size)

    def leaf(self, f: Factor) -> Any:
        """Of one resolved factor."""
        if f in self.cut:
            return self.cut[f]
        if f.cat:
            return sum(self.dim(d) for d in self.factors.flat(f.cat))
        return self.value(f.size)

    def dim(self, dim: Sequence[Factor]) -> Any:
        """The local size of a dim."""
        return math.prod(self.leaf(f) for f in self.factors.expand(tuple(dim)))

    def is_cut(self, dim: Sequence[Factor]) -> bool:
        return any(f in self.cut for f in self.factors.leaves(tuple(dim)))

    def around(self, dim: Sequence[Factor], f: Factor) -> tuple[Any, Any]:
        """(lead, trail): local sizes of what is major and minor of `f` in a dim that is a plain
        product."""
        leaves = self.factors.expand(tuple(dim))
        at = leaves.index(f)
        return self.dim(leaves[:at]), self.dim(leaves[at + 1 :])

    def where(self, dims: Dims, leaf: Factor) -> tuple[int, Any, Any]:
        """(dim, lead, trail) of a sequence."""
        for k, d in enumerate(dims):
            if leaf in self.factors.leaves(tuple(d)):
                return (k, *self.around(d, leaf))
        raise AssertionError("no sequence in these dims")

    def before(self, dim: Sequence[Factor], start: Size) -> Any:
        """Local elements of a dim before global element `start`, which lies on a segment
        bound."""
        leaves = self.factors.expand(tuple(dim))
        if not start or not leaves or not leaves[0].cat:
            return start
        others = tuple(leaves[1:])
        minor, at, local = self.factors.size(others), 0, 0
        for segment in self.factors.flat(leaves[0].cat):
            if at == start:
                break
            at += self.value(self.factors.size(segment) * minor)
            local += self.dim((*segment, *others))
        assert at == start, f"a slice from {start} falls inside of a segment"
        return local
