"""Predicates as text: what is printed computes what the expression says, on tensors and on blocks
of intervals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import sympy
import torch

from tspc.masks import predicate as pr
from tspc.masks.index import TRUE, At, negate, nonnegative, remainder, rounded_down, zero
from tspc.masks.predicate import ANY, Bounds, Interval, K, Q, Truth, Unprintable, mask, truth

S = sympy.Symbol("size", integer=True, positive=True)
D = sympy.Symbol("data")
THREE = sympy.Integer(3)
LENGTH, SIZE = 9, 4
ROWS = torch.tensor([[[0, 0, 1, 1, 1, 2, 2, 3, 3]], [[5, 4, 4, 4, 3, 3, 1, 0, 0]]])

TEXTS: list[tuple[Any, str]] = [
    (nonnegative(Q - K), "(q >= k)"),
    (nonnegative(Q - K - 3), "(q >= k + 3)"),
    (nonnegative(3 - K), "(k <= 3)"),
    (zero(Q - K), "(q == k)"),
    (negate(zero(Q - K)), "(q != k)"),
    (sympy.And(nonnegative(Q - K), nonnegative(K - 2)), "((k >= 2) & (q >= k))"),
    (sympy.Or(nonnegative(Q - K), zero(K)), "((k == 0) | (q >= k))"),
    (nonnegative(S - sympy.Abs(Q - K)), "((k + s0 >= q) & (q + s0 >= k))"),
    (zero(rounded_down(Q, THREE) - rounded_down(K, THREE)), "((k // 3) == (q // 3))"),
    (zero(remainder(K, THREE) - 1), "((k % 3) == 1)"),
    (nonnegative(2 * Q - K - sympy.Min(K, 2)), "((2 * q) >= k + least(2, k))"),
    (nonnegative(sympy.Max(Q, K) - 5), "(most(k, q) >= 5)"),
    (zero(At(D, K) - At(D, Q)), "(d0[k] == d0[q])"),
    (TRUE, "True"),
]


def printed(e: sympy.Basic) -> str:
    return pr.printed(e, lambda at: f"d0[{at.args[1]}]", lambda s: "s0")


@pytest.mark.parametrize("e,text", TEXTS, ids=[t for _, t in TEXTS])
def test_a_predicate_as_text(e: sympy.Basic, text: str) -> None:
    assert sorted(printed(e)) == sorted(text)
    assert printed(e).count("(") == text.count("(")


def says(e: Any, q: int, k: int, row: torch.Tensor) -> bool:
    e = e.subs({Q: q, K: k, S: SIZE})
    return bool(e.replace(At, lambda _, i: sympy.Integer(int(row[0, int(i)]))))


@pytest.mark.parametrize("e", [e for e, _ in TEXTS], ids=[t for _, t in TEXTS])
def test_a_mask_of_its_text(e: sympy.Basic) -> None:
    at = torch.arange(LENGTH)
    got = mask(printed(e), at[2:], at, (SIZE,), ROWS)
    assert got.shape[1:] == (1, LENGTH - 2, LENGTH) and got.shape[0] in (1, 2)
    for b, q, k in itertools.product(range(got.shape[0]), range(2, LENGTH), range(LENGTH)):
        assert got[b, 0, q - 2, k].item() == says(e, q, k, ROWS[b]), (b, q, k)


@pytest.mark.parametrize("e", [e for e, _ in TEXTS], ids=[t for _, t in TEXTS])
def test_the_truth_of_a_block(e: sympy.Basic) -> None:
    """All, none, or not known."""
    text, bounds, certain = printed(e), Bounds(ROWS), 0
    for q, k in itertools.product((0, 3, 7), (0, 2, 7)):
        inside = [
            says(e, i, j, row) for i in range(q, q + 2) for j in range(k, k + 2) for row in ROWS
        ]
        answer = truth(text, (q, q + 1), (k, k + 1), (SIZE,), bounds)
        assert answer is None or set(inside) == {answer}, (q, k)
        certain += answer is not None
    assert certain >= (0 if "d0" in text or "%" in text else 2)


def test_data_that_is_not_seen_is_not_known() -> None:
    assert truth("(d0[k] >= 0)", (0, 1), (0, 1), ()) is None
    assert truth("(d0[k] >= 0)", (0, 1), (0, 1), (), Bounds(ROWS)) is True
    assert truth("(d0[k] >= 6)", (0, 1), (0, 1), (), Bounds(ROWS)) is False


def test_bounds_are_of_blocks() -> None:
    rows = torch.arange(300)[None, None]
    bounds = Bounds(rows)
    row = bounds.row(0)
    assert (row[Interval(0, 5)].lo, row[Interval(0, 5)].hi) == (0, Bounds.BLOCK - 1)
    ends = row[Interval(130, math.inf)]
    assert (ends.lo, ends.hi) == (Bounds.BLOCK, 299) and row[299].hi == 299


def test_what_has_no_form() -> None:
    with pytest.raises(Unprintable, match="sin"):
        printed(zero(sympy.sin(Q) - K))


VALUES = (True, False, None)


def test_truths_are_three_valued() -> None:
    for a, b in itertools.product(VALUES, repeat=2):
        worlds = [
            (x, y)
            for x, y in itertools.product((True, False), repeat=2)
            if a in (None, x) and b in (None, y)
        ]
        for got, each in (
            (Truth(a) & Truth(b), {x and y for x, y in worlds}),
            (Truth(a) | Truth(b), {x or y for x, y in worlds}),
            (~Truth(a), {not x for x, _ in worlds}),
        ):
            assert got.value == (each.pop() if len(each) == 1 else None)
    assert (True & Truth(None)).value is None and (Truth(None) | True).value is True


INTERVALS = [(-3, 2), (0, 4), (2, 2), (-5, -4), (5, 9)]


@pytest.mark.parametrize("a,b", list(itertools.product(INTERVALS, repeat=2)))
def test_intervals_hold_all_values(a: tuple[int, int], b: tuple[int, int]) -> None:
    x, y = Interval(*a), Interval(*b)
    pairs = list(itertools.product(range(a[0], a[1] + 1), range(b[0], b[1] + 1)))
    for got, values in (
        (x + y, [i + j for i, j in pairs]),
        (x * y, [i * j for i, j in pairs]),
        (-x, [-i for i, _ in pairs]),
        (abs(x), [abs(i) for i, _ in pairs]),
    ):
        assert (got.lo, got.hi) == (min(values), max(values))
    for got, wanted in (
        (x >= y, {i >= j for i, j in pairs}),
        (x <= y, {i <= j for i, j in pairs}),
        (x == y, {i == j for i, j in pairs}),
        (x != y, {i != j for i, j in pairs}),
    ):
        assert got.value == (wanted.pop() if len(wanted) == 1 else None)
    for n in (1, 3):
        floors, rests = {i // n for i, _ in pairs}, {i % n for i, _ in pairs}
        assert ((x // n).lo, (x // n).hi) == (min(floors), max(floors))
        assert (x % n).lo <= min(rests) and (x % n).hi >= max(rests)
    assert (x + 1).lo == a[0] + 1 and (2 * x).hi == 2 * a[1] and (1 + x).hi == a[1] + 1


def test_division_by_what_is_no_plain_number_says_nothing() -> None:
    x = Interval(2, 7)
    for got in (x // 0, x % -1, x // x, x % x, 7 // x, 7 % x):
        assert got is ANY
    assert (x % 8).hi == 7 and (x % 8).lo == 2 and (x % 4).lo == 0


def test_the_least_and_the_most() -> None:
    least, most = pr._FUNCTIONS["least"], pr._FUNCTIONS["most"]
    at = torch.arange(4)
    assert least(at, 2).tolist() == [0, 1, 2, 2] and most(1, at, 2).tolist() == [2, 2, 2, 3]
    got = least(Interval(0, 5), 3)
    assert (got.lo, got.hi) == (0, 3) and most(Interval(0, 5), Interval(2, 3), 1).lo == 2
