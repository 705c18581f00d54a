"""Index arithmetic: predicates in one form, decided where the symbols allow it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import sympy
import torch

from tspc.masks import index as ix
from tspc.masks.index import FALSE, TRUE, At, Cases, index

I, J = index(0), index(1)


def same(p: Any, q: Any, size: int = 5) -> None:
    """Two predicates or numbers agree at all places."""
    for i, j in itertools.product(range(size), repeat=2):
        assert p.subs({I: i, J: j}) == q.subs({I: i, J: j}), (i, j)


def test_an_index_is_a_number_from_zero_on() -> None:
    assert index(3).name == "i3" and index(3).is_nonnegative and index(3) == index(3)


@pytest.mark.parametrize(
    "e,answer", [(I, TRUE), (I + 1, TRUE), (-I - 1, FALSE), (sympy.Integer(-1), FALSE)]
)
def test_signs_are_decided(e: sympy.Expr, answer: object) -> None:
    assert ix.nonnegative(e) == answer


def test_absolute_values_are_two_inequalities() -> None:
    p = ix.nonnegative(2 - sympy.Abs(I - J))
    assert isinstance(p, sympy.And) and not p.atoms(sympy.Abs)
    same(p, sympy.Le(sympy.Abs(I - J), 2))
    q = ix.nonnegative(sympy.Abs(I - J) - 2)
    assert isinstance(q, sympy.Or)
    same(q, sympy.Ge(sympy.Abs(I - J), 2))


def test_zeros_have_one_sign() -> None:
    assert ix.zero(I - J) == ix.zero(J - I)
    assert ix.zero(sympy.Integer(0)) == TRUE and ix.zero(sympy.Integer(2)) == FALSE
    assert ix.zero(I + 1) == FALSE


@pytest.mark.parametrize(
    "p",
    [
        ix.nonnegative(I - J),
        ix.zero(I - J),
        sympy.And(ix.nonnegative(I - J), ix.nonnegative(J - 2)),
        sympy.Or(ix.nonnegative(I - J), ix.zero(J - 2)),
        TRUE,
        FALSE,
    ],
    ids=str,
)
def test_what_is_negated_twice_is_as_before(p: Any) -> None:
    same(ix.negate(p), sympy.Not(p))
    assert ix.negate(ix.negate(p)) == p
    assert not ix.negate(p).atoms(sympy.Lt)


@pytest.mark.parametrize("kind", ix.COMPARE)
def test_comparisons(kind: str) -> None:
    torchs = getattr(torch, kind)
    a, b = torch.arange(5)[:, None], torch.arange(5)[None] * 2 - 3
    wanted = torchs(a, b)
    p = ix.COMPARE[kind](I, 2 * J - 3)
    for i, j in itertools.product(range(5), repeat=2):
        assert bool(p.subs({I: i, J: j})) == wanted[i, j].item()


def test_kinds_of_expressions() -> None:
    cases = Cases(((0.0, TRUE),))
    assert ix.is_predicate(I >= J) and not ix.is_predicate(I) and not ix.is_predicate(cases)
    assert ix.is_number(I + 1) and not ix.is_number(I >= J) and not ix.is_number(cases)


def test_integer_division() -> None:
    for n in range(-7, 8):
        e = sympy.Integer(n)
        assert ix.rounded_down(e, sympy.Integer(3)) == n // 3
        assert ix.remainder(e, sympy.Integer(3)) == n % 3
    assert ix.expanded(2 * (I + 1)) == 2 * I + 2


def test_substitution_keeps_the_form() -> None:
    p = ix.nonnegative(I - J)
    assert ix.substitute(p, {I: J}) == TRUE
    assert ix.substitute(ix.zero(I - J), {I: J + 1}) == FALSE
    assert ix.substitute(sympy.Not(ix.zero(I - J), evaluate=False), {I: J}) == FALSE
    assert ix.substitute(I, {I: J + 1}) == J + 1 and ix.substitute(p, {index(5): J}) is p
    x = At(sympy.Symbol("x"), I)
    assert ix.substitute(x + 1, {I: J}) == At(sympy.Symbol("x"), J) + 1
    cases = ix.substitute(Cases(((1.0, p), (0.0, ix.negate(p)))), {I: J})
    assert cases == Cases(((1.0, TRUE), (0.0, FALSE)))


def test_a_choice_of_floats_covers_everything_once() -> None:
    p = ix.nonnegative(I - J)
    both = ix.select_float(p, Cases(((0.0, TRUE),)), Cases(((-1.0, TRUE),)))
    same(dict(both.values)[0.0], p)
    same(dict(both.values)[-1.0], sympy.Not(p))
    equal = ix.select_float(p, Cases(((0.0, TRUE),)), Cases(((0.0, TRUE),)))
    assert len(equal.values) == 1
    none = ix.select_float(TRUE, Cases(((0.0, TRUE),)), Cases(((1.0, TRUE),)))
    assert none == Cases(((0.0, TRUE),))


def test_a_choice_of_predicates_and_its_clauses() -> None:
    p, a, b = ix.nonnegative(I - J), ix.zero(J), ix.nonnegative(I - 2)
    same(ix.select(p, a, b), sympy.ITE(p, a, b))
    assert set(ix.clauses(sympy.And(a, b))) == {a, b}
    assert ix.clauses(p) == [p] and ix.clauses(TRUE) == []


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2],
    ids=str,
)
def test_a_number_is_as_a_tensor_holds_it(dtype: torch.dtype) -> None:
    values = [0.1, -1e9, 65504.0, 1e6, 3.3895e38, -float("inf"), 1 + 2**-8, 1 + 3 * 2**-8]
    for v in values:
        assert ix.held(v, dtype) == torch.tensor(v, dtype=torch.float64).to(dtype).item(), v
