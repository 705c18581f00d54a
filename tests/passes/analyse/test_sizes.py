"""Local sizes: of symbols and of dims with a factor that is cut."""

from __future__ import annotations

import pytest
import sympy

from tspc.factors.factor import Factors
from tspc.passes.analyse.sizes import Sizes

S = sympy.Symbol("s", positive=True, integer=True)


def test_dims_with_a_cut_factor() -> None:
    F = Factors()
    b, s, d = F.new(2), F.new(S), F.new(3)
    sizes = Sizes(F, {s: 4})
    assert sizes.dim((b, s, d)) == 2 * 4 * 3 and sizes.dim(()) == 1
    assert sizes.shape([(b,), (s,)]) == (2, 4) and Sizes(F, {}).dim((b, s)) == 2 * S
    assert sizes.leaf(s) == 4 and sizes.leaf(d) == 3
    assert sizes.is_cut((b, s)) and not sizes.is_cut((b, d))
    assert sizes.around((b, s, d), s) == (2, 3)
    assert sizes.where([(d,), (b, s)], s) == (1, 2, 1)
    with pytest.raises(AssertionError, match="the factor is not in these dims"):
        sizes.where([(d,)], s)


def test_segments_with_a_cut_factor() -> None:
    F = Factors()
    h, d = F.new(6), F.new(4)
    dim = F.concat([(h, d), (d,), (d,)])
    sizes = Sizes(F, {h: 2})
    assert sizes.dim(dim) == 2 * 4 + 4 + 4
    assert [sizes.before(dim, start) for start in (0, 24, 28)] == [0, 8, 12]
    with pytest.raises(AssertionError, match="a slice from 5 falls inside of a segment"):
        sizes.before(dim, 5)
    assert sizes.before((h,), 3) == 3
