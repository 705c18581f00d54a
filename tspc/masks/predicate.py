"""Predicates over (q, k) as text: one print is the mask of any block, the answer for a block of
intervals, and what `explain` shows.

q and k are positions, `d0[..]` is data per position of each batch entry, `s0` a size. Data comes
as rows [batch or 1, count, positions] of integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any

import sympy
import torch
from torch.types import IntLikeType

from tspc.masks.index import FALSE, TRUE, At
from tspc.seams.sizes import FloorDiv, PythonMod

Tensor = torch.Tensor
B, H, Q, K = (sympy.Symbol(s, integer=True, nonnegative=True) for s in "bhqk")


SIGNS = {sympy.And: " & ", sympy.Or: " | ", sympy.Add: " + ", sympy.Mul: " * "}
FUNCTIONS = {sympy.Abs: "abs", sympy.Min: "least", sympy.Max: "most"}


def printed(
    e: sympy.Basic, data: Callable[[sympy.Basic], str], size: Callable[[sympy.Symbol], str]
) -> str:
    """The text of a predicate or an integer. data, size: of an element `At` and of a symbol."""
    return _Printer(data, size).show(e)


@dataclass(frozen=True)
class _Printer:
    data: Callable[[sympy.Basic], str]
    size: Callable[[sympy.Symbol], str]

    def show(self, e: sympy.Basic) -> str:
        if isinstance(e, sympy.Integer):
            return str(int(e))
        if isinstance(e, sympy.Symbol):
            return e.name if e in (Q, K) else self.size(e)
        if e.func == At:
            return self.data(e)
        sign = next((s for kind, s in SIGNS.items() if isinstance(e, kind)), None)
        if sign is not None:
            return self.joined(sign, e.args)
        name = next((s for kind, s in FUNCTIONS.items() if isinstance(e, kind)), None)
        if name is not None:
            return f"{name}({', '.join(sorted(map(self.show, e.args)))})"
        if isinstance(e, (FloorDiv, PythonMod)):
            sign = "//" if isinstance(e, FloorDiv) else "%"
            return f"({self.show(e.args[0])} {sign} {self.show(e.args[1])})"
        return self.truth(e)

    def truth(self, e: sympy.Basic) -> str:
        if e in (TRUE, FALSE):
            return str(bool(e))
        if isinstance(e, sympy.Not) and isinstance(e.args[0], sympy.Eq):
            return self.compared(e.args[0], "!=")
        if isinstance(e, (sympy.Ge, sympy.Eq, sympy.Ne)):
            return self.compared(e, e.rel_op)
        raise Unprintable(str(e))

    def joined(self, sign: str, parts: Sequence[sympy.Basic]) -> str:
        texts = sorted(map(self.show, parts), key=lambda t: (t.isdigit(), t))
        return f"({sign.join(texts)})"

    def side(self, terms: Sequence[sympy.Expr]) -> str:
        text = self.show(sympy.Add(*terms))
        return text[1:-1] if len(terms) > 1 else text

    def compared(self, e: Any, relation: str) -> str:
        """a - b >= 0 as a >= b, with a number on the right."""
        left, right = [], []
        for term in sympy.Add.make_args(sympy.expand(e.lhs - e.rhs)):
            negative = term.could_extract_minus_sign()
            (right if negative else left).append(-term if negative else term)
        if not sympy.Add(*left).free_symbols:
            left, right, relation = right, left, relation.replace(">", "<")
        return f"({self.side(left)} {relation} {self.side(right)})"


class Unprintable(Exception):
    """An expression that the text has no form for."""


# -- what computes the text -----------------------------------------------------------------


class Truth:
    """True or False for all of a block, or None."""

    def __init__(self, value: bool | None):
        self.value = value

    def __and__(self, other: Truth | bool) -> Truth:
        values = self.value, _truth(other).value
        return Truth(False if False in values else None if None in values else True)

    def __or__(self, other: Truth | bool) -> Truth:
        return ~(~self & ~_truth(other))

    def __invert__(self) -> Truth:
        return Truth(None if self.value is None else not self.value)

    __rand__, __ror__ = __and__, __or__


def _truth(x: object) -> Truth:
    return x if isinstance(x, Truth) else Truth(bool(x))


@dataclass(frozen=True, eq=False)
class Interval:
    """Integers from lo to hi, both included; compares to a `Truth`."""

    lo: float
    hi: float

    def __add__(self, other: Interval | int) -> Interval:
        o = _interval(other)
        return Interval(self.lo + o.lo, self.hi + o.hi)

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __mul__(self, other: Interval | int) -> Interval:
        o = _interval(other)
        ends = [0 if 0 in (a, b) else a * b for a in (self.lo, self.hi) for b in (o.lo, o.hi)]
        return Interval(min(ends), max(ends))

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other: Interval | int) -> Interval:
        if not isinstance(other, int) or other <= 0:
            return ANY
        return Interval(*(x if math.isinf(x) else x // other for x in (self.lo, self.hi)))

    def __mod__(self, other: Interval | int) -> Interval:
        if not isinstance(other, int) or other <= 0:
            return ANY
        first = self // other
        if first.lo == first.hi and not math.isinf(first.lo):
            return self + -(first * other)
        return Interval(0, other - 1)

    def __rfloordiv__(self, other: Interval | int) -> Interval:
        return ANY

    def __rmod__(self, other: Interval | int) -> Interval:
        return ANY

    def __abs__(self) -> Interval:
        if self.lo >= 0 or self.hi <= 0:
            return self if self.lo >= 0 else -self
        return Interval(0, max(-self.lo, self.hi))

    def __ge__(self, other: object) -> Truth:
        o = _interval(other)
        return Truth(True if self.lo >= o.hi else False if self.hi < o.lo else None)

    def __le__(self, other: object) -> Truth:
        return _interval(other) >= self

    def __eq__(self, other: object) -> Any:
        o = _interval(other)
        if self.lo > o.hi or self.hi < o.lo:
            return Truth(False)
        return Truth(True if self.lo == self.hi == o.lo == o.hi else None)

    def __ne__(self, other: object) -> Any:
        return ~(self == other)


ANY = Interval(-math.inf, math.inf)
Operand = Tensor | Interval | float
Number = IntLikeType | Interval  # a size


def _interval(x: Any) -> Interval:
    return x if isinstance(x, Interval) else Interval(x, x)


def _beside(like: Operand, x: Operand) -> Tensor:
    """A number as a tensor beside another."""
    if isinstance(x, Tensor):
        return x
    assert isinstance(like, Tensor) and not isinstance(x, Interval)
    return like.new_full((), x)


def _extreme(name: str) -> Callable[..., Operand]:
    on_tensors, on_numbers = getattr(torch, f"{name}imum"), {"min": min, "max": max}[name]

    def pair(a: Operand, b: Operand) -> Operand:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            like = a if isinstance(a, Tensor) else b
            return on_tensors(*(_beside(like, x) for x in (a, b)))
        a, b = _interval(a), _interval(b)
        return Interval(on_numbers(a.lo, b.lo), on_numbers(a.hi, b.hi))

    def of(first: Operand, *others: Operand) -> Operand:
        for x in others:
            first = pair(first, x)
        return first

    return of


_FUNCTIONS = {"abs": abs, "least": _extreme("min"), "most": _extreme("max")}


@lru_cache(maxsize=256)
def _code(text: str) -> tuple[CodeType, int]:
    """The compiled text and how many rows of data it may read."""
    code = compile(text, "<mask>", "eval")
    numbers = [int(n[1:]) for n in code.co_names if n[0] == "d" and n[1:].isdigit()]
    return code, max(numbers, default=-1) + 1


def _evaluated(
    text: str,
    q: Operand,
    k: Operand,
    sizes: Sequence[Number],
    row: Callable[[int], _Row | _Bounded | _Unknown],
) -> Tensor | Truth | bool:
    code, count = _code(text)
    names = {f"s{i}": s for i, s in enumerate(sizes)} | {f"d{i}": row(i) for i in range(count)}
    return eval(code, {**_FUNCTIONS, "q": q, "k": k, **names})  # noqa: S307  text of `printed`


@dataclass(frozen=True)
class _Row:
    """Rows of data [batch or 1, positions], read at a tensor of positions."""

    values: Tensor

    def __getitem__(self, at: Tensor | int) -> Tensor:
        if not isinstance(at, Tensor):
            return self.values[:, at, None, None]
        return self.values[:, at.clamp(0, self.values.shape[-1] - 1)]


def mask(text: str, q: Tensor, k: Tensor, sizes: Sequence[Number], rows: Tensor | None) -> Tensor:
    """[batch or 1, 1, len(q), len(k)]: the predicate at these positions."""

    def row(i: int) -> _Row:
        assert rows is not None
        return _Row(rows[:, i])

    truths = _evaluated(text, q[:, None], k[None, :], sizes, row)
    if not isinstance(truths, Tensor):
        truths = torch.full((1, 1), bool(truths), dtype=torch.bool, device=q.device)
    truths = truths[None] if truths.dim() == 2 else truths
    return truths.expand(-1, q.shape[0], k.shape[0]).unsqueeze(1)


class Bounds:
    """Least and greatest values of each row of data, by blocks of positions."""

    BLOCK = 128

    def __init__(self, rows: Tensor):
        parts = [p for p in rows.split(self.BLOCK, -1)]
        ends = [torch.stack([f(p, (0, 2)) for p in parts]) for f in (torch.amin, torch.amax)]
        self.low, self.high = torch.stack(ends).tolist()
        self.last = rows.shape[-1] - 1

    def row(self, i: int) -> _Bounded:
        return _Bounded(self, i)


@dataclass(frozen=True)
class _Bounded:
    bounds: Bounds
    number: int

    def __getitem__(self, at: Interval | int) -> Interval:
        at, all_ = _interval(at), self.bounds
        ends = (int(min(max(x, 0), all_.last)) // all_.BLOCK for x in (at.lo, at.hi))
        first, last = ends
        return Interval(
            min(x[self.number] for x in all_.low[first : last + 1]),
            max(x[self.number] for x in all_.high[first : last + 1]),
        )


class _Unknown:
    def __getitem__(self, at: object) -> Interval:
        return ANY


def truth(
    text: str,
    q: tuple[float, float],
    k: tuple[float, float],
    sizes: Sequence[Number],
    bounds: Bounds | None = None,
) -> bool | None:
    """Whether the predicate holds for all (True) or none (False) of a block of positions, ends
    included; None: for some, or not known."""
    row = bounds.row if bounds is not None else lambda _: _Unknown()
    return _truth(_evaluated(text, Interval(*q), Interval(*k), sizes, row)).value
