"""Index expressions: what a tensor holds at index (i0, i1, ...), as sympy (docs/design.md,
"Index expressions and masks").

Integers are sympy expressions, booleans sympy predicates, floats a finite `Cases` of values. Data
is `At(node, indices)`: a node without a rule is a reference to itself, so nothing is ever guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import sympy
import torch
from sympy import Expr
from sympy.logic.boolalg import Boolean
from typing_extensions import TypeIs

from tspc.seams.sizes import FloorDiv, PythonMod

At = sympy.Function(
    "At", integer=True
)  # At(node, *indices): an element of a tensor that stays data
TRUE, FALSE = sympy.true, sympy.false


def index(d: int) -> sympy.Symbol:
    """The index symbol of dim d."""
    return sympy.Symbol(f"i{d}", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Cases:
    """A float: each value where its predicate holds; the predicates cover everything,
    disjointly."""

    values: tuple[tuple[float, Boolean], ...]


Expression = Expr | Boolean | Cases


def expanded(e: Expr) -> Expr:
    return sympy.expand(e)  # pyright: ignore[reportReturnType]


def rounded_down(a: Expr, b: Expr) -> Expr:
    return FloorDiv(a, b)  # pyright: ignore[reportReturnType]


def remainder(a: Expr, b: Expr) -> Expr:
    return PythonMod(a, b)  # pyright: ignore[reportReturnType]


def nonnegative(e: Expr) -> Boolean:
    """e >= 0, decided where the symbols allow it."""
    e = expanded(e)
    if e.is_nonnegative:
        return TRUE
    if e.is_negative:
        return FALSE
    for a in e.atoms(sympy.Abs):  # c - |x| >= 0 is c - x >= 0 and c + x >= 0
        times, x = e.coeff(a) or sympy.Integer(0), a.args[0]
        if times.is_negative:
            return sympy.And(*(nonnegative(e - times * a + sign * times * x) for sign in (1, -1)))
        if times.is_positive:
            return sympy.Or(*(nonnegative(e - times * a + sign * times * x) for sign in (1, -1)))
    return sympy.Ge(e, 0, evaluate=False)


def zero(e: Expr) -> Boolean:
    """e == 0."""
    e = expanded(e)
    if e.is_zero:
        return TRUE
    if e.is_Integer or e.is_positive or e.is_negative:
        return FALSE
    e = -e if e.could_extract_minus_sign() else e
    return sympy.Eq(e, 0, evaluate=False)  # pyright: ignore[reportReturnType]


def negate(p: Boolean) -> Boolean:
    """not p, inequalities turned round so that equal predicates have equal forms."""
    if p in (TRUE, FALSE):
        return FALSE if p == TRUE else TRUE
    if isinstance(p, sympy.Ge):
        lhs: Any = p.lhs
        return nonnegative(-lhs - 1)
    if isinstance(p, sympy.And):
        return sympy.Or(*map(negate, p.args))
    if isinstance(p, sympy.Or):
        return sympy.And(*map(negate, p.args))
    if isinstance(p, sympy.Not):
        (inner,) = p.args
        assert isinstance(inner, Boolean)
        return inner
    return sympy.Not(p, evaluate=False)


COMPARE = {
    "ge": lambda a, b: nonnegative(a - b),
    "le": lambda a, b: nonnegative(b - a),
    "gt": lambda a, b: nonnegative(a - b - 1),
    "lt": lambda a, b: nonnegative(b - a - 1),
    "eq": lambda a, b: zero(a - b),
    "ne": lambda a, b: negate(zero(a - b)),
}


def is_predicate(e: object) -> TypeIs[Boolean]:
    return isinstance(e, Boolean) and not isinstance(e, sympy.Symbol)


def is_number(e: object) -> TypeIs[Expr]:
    """An integer: neither a float's cases nor a predicate."""
    return isinstance(e, Expr) and not is_predicate(e)


@overload
def substitute(e: Boolean, to: Mapping[sympy.Symbol, Expr]) -> Boolean: ...


@overload
def substitute(e: Expr, to: Mapping[sympy.Symbol, Expr]) -> Expr: ...


@overload
def substitute(e: Expression, to: Mapping[sympy.Symbol, Expr]) -> Expression: ...


def substitute(e: Any, to: Mapping[sympy.Symbol, Expr]) -> Any:
    """Index symbols replaced, comparisons brought to normal form again."""
    if isinstance(e, Cases):
        return Cases(tuple((v, substitute(p, to)) for v, p in e.values))
    if e in to:
        return to[e]
    if not e.args:
        return e
    args = [substitute(a, to) for a in e.args]
    if all(a is b for a, b in zip(args, e.args)):
        return e
    if isinstance(e, sympy.Ge):
        return nonnegative(args[0])
    if isinstance(e, sympy.Eq):
        return zero(args[0])
    if isinstance(e, sympy.Not):
        return negate(args[0])
    return e.func(*args)


def select_float(p: Boolean, a: Cases, b: Cases) -> Cases:
    """where(p, a, b) of finite floats."""
    merged: dict[float, Boolean] = {}
    for where, cases in ((p, a), (negate(p), b)):
        for v, q in cases.values:
            merged[v] = sympy.Or(merged.get(v, FALSE), sympy.And(where, q))
    return Cases(tuple((v, q) for v, q in merged.items() if q != FALSE))


def select(p: Boolean, a: Boolean, b: Boolean) -> Boolean:
    """where(p, a, b) of predicates."""
    return sympy.Or(sympy.And(p, a), sympy.And(negate(p), b))


def clauses(p: Boolean) -> list[Boolean]:
    """The conjuncts of a predicate."""
    if isinstance(p, sympy.And):
        return list(p.args)
    return [] if p == TRUE else [p]


def held(v: float, dtype: torch.dtype) -> float:
    """As a tensor of a type holds it."""
    if dtype == torch.float64:
        return float(v)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return float(torch.tensor(v, dtype=dtype))
    with np.errstate(over="ignore"):
        if dtype == torch.float16:
            return float(np.float16(v))
        single = np.float32(v)
        if dtype != torch.bfloat16 or not np.isfinite(single):
            return float(single)
        bits = int(single.view(np.uint32))
        bits += 0x7FFF + (bits >> 16 & 1)  # to the nearest, of two to the even one
        return float(np.uint32(bits & 0xFFFF0000).view(np.float32))
