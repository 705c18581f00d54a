"""Factors: sizes that divide, dims refined into products and segments, dims made one."""

from __future__ import annotations

import pytest
import sympy

from tspc.factors.factor import Dim, Factor, Factors, const, divide, norm

S, B = (sympy.Symbol(n, positive=True, integer=True) for n in "sb")


@pytest.mark.parametrize(
    "a,b,quotient",
    [
        (12, 3, 4),
        (12, 5, None),
        (0, 3, 0),
        (S, S, 1),
        (6 * S, 2 * S, 3),
        (S * B, S, B),
        (S, 2, None),
    ],
)
def test_division_is_exact_for_any_value(a: object, b: object, quotient: object) -> None:
    assert divide(a, b) == quotient


def test_plain_numbers() -> None:
    assert type(norm(sympy.Integer(3))) is int and norm(S) is S
    assert const(3) and not const(S)


def sizes(F: Factors, dims: list[Dim] | None) -> list[list[object]] | None:
    return None if dims is None else [[f.size for f in F.expand(d)] for d in dims]


def test_a_size_of_one_has_no_factor() -> None:
    F = Factors()
    assert F.dim(1) == () and F.size(()) == 1 and F.show(()) == "1"
    (f,) = F.dim(6, "here")
    assert (repr(f), f.origin, F.show((f,)), F.show((f,), {f.id: "H"})) == (
        "f0:6",
        "here",
        "6#0",
        "H",
    )


def test_a_dim_laid_end_to_end_is_flat() -> None:
    F = Factors()
    a, b, c = F.dim(2), F.dim(3), F.dim(4)
    inner = F.concat([a, b])
    outer = F.concat([inner, c])
    assert F.size(outer) == 9 and F.flat([outer]) == [a, b, c]
    assert list(F.leaves(outer)) == [*a, *b, *c] and F.concat([a]) == a
    assert F.show(outer) == "(2#0 + 3#1 + 4#2)"


def test_a_split_refines_once_and_for_all() -> None:
    F = Factors()
    f = F.new(12)
    assert F.split(f, 5) is None
    assert F.split(f, 3) is not None and [g.size for g in F.expand((f,))] == [3, 4]


def test_equal_segments_are_a_product() -> None:
    F = Factors()
    dim = F.concat([F.dim(4), F.dim(4), F.dim(4)])
    assert F.split(dim[0], 2) is None
    assert F.split(dim[0], 3) is not None and [g.size for g in F.expand(dim)] == [3, 4]
    uneven = F.concat([F.dim(2), F.dim(4)])
    assert F.split(uneven[0], 2) is None


def test_a_split_goes_through_to_the_image() -> None:
    F = Factors()
    f = F.new(6)
    twin = F.image(f)
    assert twin.image_of is f and F.image(twin) is twin and F.image(f) is twin
    F.split(f, 2)
    assert [F.find(g.image_of).size for g in F.expand((twin,)) if g.image_of] == [2, 3]


@pytest.mark.parametrize(
    "parts,cuts,pieces",
    [
        ((10,), (4, 6), [[4], [6]]),
        ((10, 3), (12, 18), [[4, 3], [6, 3]]),
        ((10, 3), (10, 20), None),
        ((), (1,), None),
    ],
)
def test_a_cut_into_segments(parts: tuple, cuts: tuple, pieces: object) -> None:
    F = Factors()
    dim = tuple(F.new(n) for n in parts)
    assert sizes(F, F.cut(dim, cuts)) == pieces


def test_a_cut_between_and_inside_of_segments() -> None:
    F = Factors()
    a, b = F.dim(4), F.dim(6)
    dim = F.concat([a, b])
    assert F.cut(dim, [4, 6]) == [a, b] and F.cut(dim, [5, 5]) is None
    assert F.cut(dim, [4, 4]) is None
    (whole,) = F.cut(dim, [10]) or []
    assert F.size(whole) == 10


@pytest.mark.parametrize(
    "before,after,parts",
    [
        ((3, 10), (6, 5), [[3, 2], [5]]),
        ((12,), (3, 2, 2), [[3], [2], [2]]),
        ((3, 4), (12,), [[3, 4]]),
        ((3, 4), (4, 3), None),
        ((3, 4), (3,), None),
        ((3,), (3, 4), None),
        ((S, 4), (S, 2, 1, 2), [[S], [2], [], [2]]),
    ],
)
def test_dims_regrouped(before: tuple, after: tuple, parts: object) -> None:
    F = Factors()
    assert sizes(F, F.regroup([F.dim(n) for n in before], after)) == parts


def test_symbolic_sizes_are_the_same_by_their_hints() -> None:
    F = Factors({S: 8, B: 8})
    assert F.same(3, 3) and not F.same(S, 8) and F.same(S, B) and F.same(2 * S, S + B)
    assert not F.same(S, B + 1)


def test_unified_dims_share_leaves_the_coarser_refined() -> None:
    F = Factors({S: 8, B: 8})
    a, b = F.dim(12), F.dim(3) + F.dim(4)
    assert F.unify(a, b) and F.expand(a) == F.expand(b)
    assert F.unify(F.dim(S), F.dim(B))
    assert not F.unify(F.dim(5), F.dim(3)) and not F.unify(F.dim(5), ())


def test_unified_segments_are_cut_at_all_bounds() -> None:
    F = Factors()
    a = F.concat([F.dim(2), F.dim(5)])
    b = F.concat([F.dim(4), F.dim(3)])
    assert F.unify(a, b) and [f.size for f in F.leaves(a)] == [2, 2, 3]
    assert list(F.leaves(a)) == list(F.leaves(b))
    uneven = F.concat([F.dim(S), F.dim(2)])
    assert not F.unify(uneven, F.concat([F.dim(2), F.dim(S)]))


def test_an_image_meets_its_original_unmerged() -> None:
    F = Factors()
    f = F.new(6)
    twin, met_in = F.image(f), list[Factor]()
    F.on_image = met_in.append
    assert F.merge(f, twin) and met_in == [f]
    assert F.find(twin) is not F.find(f) and F.merge(f, f)


def test_images_of_merged_factors_merge() -> None:
    F = Factors()
    f, g = F.new(6), F.new(6)
    twin, other = F.image(f), F.image(g)
    assert F.merge(f, g) and F.find(f) is F.find(g)
    assert F.find(twin) is F.find(other)
    h = F.new(6)
    assert F.unify((h,), F.dim(6)) and F.unify((g,), (h,)) and F.image(h) is F.find(twin)
