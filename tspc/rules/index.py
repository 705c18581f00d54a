"""Index expressions of the ops that masks are made of: (node, operands' expressions) ->
expression, None where unknown."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence

import sympy
import torch
from sympy.logic.boolalg import Boolean

from tspc.base.state import CODE, remembered
from tspc.ir.program import Node, Ref, Size, Type
from tspc.masks.index import (
    COMPARE,
    FALSE,
    TRUE,
    Cases,
    Expression,
    held,
    index,
    is_number,
    is_predicate,
    negate,
    nonnegative,
    remainder,
    rounded_down,
    select,
    select_float,
    substitute,
    zero,
)

Operand = Ref | sympy.Expr | float  # what an op is called with: a value or a number
RULES: dict[str, Callable[..., Expression | None]] = remembered(CODE, {})
MAX_CASES = 4


class Reader:
    """What a rule sees of a node: its arguments and the expressions and shapes of its operands."""

    def __init__(self, node: Node, env: Mapping[Ref, Expression], types: dict[Ref, Type]):
        self.node, self.env, self.types = node, env, types
        self.rank = len(node.type.shape)

    def shape(self, ref: Ref) -> tuple[Size, ...]:
        return self.types[ref].shape

    def aligned(self, a: Operand) -> Expression:
        """An operand's expression over the node's dims, broadcast from the right."""
        if not isinstance(a, Ref):
            return literal(a, self.node.type.dtype)
        shift = self.rank - len(self.shape(a))
        return moved(self.env[a], {d: d + shift for d in range(len(self.shape(a)))})


def moved(e: Expression, to: dict[int, int]) -> Expression:
    return substitute(e, {index(a): index(b) for a, b in to.items() if a != b})


def literal(v: float | sympy.Expr, dtype: torch.dtype) -> Expression:
    """A number as an expression of the dtype."""
    if isinstance(v, sympy.Expr):
        return v
    if isinstance(v, bool) or dtype == torch.bool:
        return TRUE if v else FALSE
    if dtype.is_floating_point:
        return Cases(((held(v, dtype), TRUE),))
    return sympy.Integer(int(v))


def as_dtype(e: Expression, dtype: torch.dtype) -> Expression | None:
    """A cast between integers, bools and finite floats."""
    if dtype == torch.bool:
        if is_predicate(e):
            return e
        if isinstance(e, Cases):
            return sympy.Or(*(p for v, p in e.values if v != 0))
        return negate(zero(e))
    if dtype.is_floating_point:
        if isinstance(e, Cases):
            values = [(held(v, dtype), p) for v, p in e.values]
            return Cases(tuple(values))
        return Cases(((1.0, e), (0.0, negate(e)))) if is_predicate(e) else None
    return None if isinstance(e, Cases) or is_predicate(e) else e


def rule(
    *names: str,
) -> Callable[[Callable[..., Expression | None]], Callable[..., Expression | None]]:
    def register(fn: Callable[..., Expression | None]) -> Callable[..., Expression | None]:
        for n in names:
            assert n not in RULES, n
            RULES[n] = fn
        return fn

    return register


def _compare(kind: str) -> None:
    @rule(kind)
    def compare(r: Reader, x: Operand, y: Operand) -> Expression | None:
        if isinstance(x, Ref) and isinstance(r.env[x], Cases) and isinstance(y, (int, float)):
            number = held(y, r.types[x].dtype)
            cases = r.aligned(x)
            assert isinstance(cases, Cases)
            return sympy.Or(*(p for v, p in cases.values if getattr(operator, kind)(v, number)))
        pair = [r.env[a] if isinstance(a, Ref) else _integer(a) for a in (x, y)]
        if any(e is None or isinstance(e, Cases) for e in pair):
            return None
        a, b = (r.aligned(v) if isinstance(v, Ref) else e for v, e in zip((x, y), pair))
        if is_predicate(a) or is_predicate(b):
            return None
        return COMPARE[kind](a, b)


def _integer(v: float | sympy.Expr) -> Expression | None:
    """A number that integers are compared with, None if it is none of them."""
    if isinstance(v, float):
        return sympy.Integer(int(v)) if v.is_integer() else None
    return literal(v, torch.int64)


for _kind in COMPARE:
    _compare(_kind)


@rule("add", "sub", "mul")
def arithmetic(r: Reader, x: Operand, y: Operand, alpha: float = 1) -> Expression | None:
    kind = r.node.op._schema.name.split("::")[1]
    a, b = r.aligned(x), r.aligned(y)
    if isinstance(a, Cases) and isinstance(b, Cases):
        return _float(kind, a, b, alpha)
    if r.node.type.dtype == torch.bool and is_predicate(a) and is_predicate(b) and kind != "sub":
        return sympy.Or(a, b) if kind == "add" else sympy.And(a, b)
    if not (is_number(a) and is_number(b)):
        return None
    b = b * alpha
    return sympy.expand({"add": a + b, "sub": a - b, "mul": a * b}[kind])


def _float(kind: str, a: Cases, b: Cases, alpha: float) -> Expression | None:
    if len(a.values) * len(b.values) > MAX_CASES:
        return None
    merged: dict[float, Boolean] = {}
    for v, p in a.values:
        for w, q in b.values:
            x = {"add": v + alpha * w, "sub": v - alpha * w, "mul": v * w}[kind]
            if math.isnan(x):
                return None
            merged[x] = sympy.Or(merged.get(x, FALSE), sympy.And(p, q))
    return Cases(tuple((v, p) for v, p in merged.items() if p != FALSE))


@rule("floor_divide", "remainder")
def division(r: Reader, x: Operand, y: Operand) -> Expression | None:
    """By a number, rounded down."""
    e = r.aligned(x)
    if isinstance(e, Cases) or is_predicate(e) or not (isinstance(y, int) and y > 0):
        return None
    whole = r.node.op._schema.name.endswith("floor_divide")
    return (rounded_down if whole else remainder)(e, sympy.Integer(y))


@rule("div")
def rounded(
    r: Reader, x: Operand, y: Operand, rounding_mode: str | None = None
) -> Expression | None:
    if r.node.type.is_float or rounding_mode is None:
        return None
    e = r.aligned(x)
    if not is_number(e) or not (isinstance(y, int) and y > 0):
        return None
    whole = rounded_down(e, sympy.Integer(y))
    return whole if rounding_mode == "floor" or e.is_nonnegative else None


@rule("neg", "abs")
def unary(r: Reader, x: Ref) -> Expression | None:
    e = r.env[x]
    if isinstance(e, Cases) or is_predicate(e):
        return None
    return -e if r.node.op._schema.name.endswith("neg") else sympy.Abs(e)


@rule("rsub")
def reversed_sub(r: Reader, x: Operand, y: Operand, alpha: float = 1) -> Expression | None:
    e = r.aligned(x)
    if isinstance(e, Cases) or is_predicate(e) or alpha != 1:
        return None
    other = r.aligned(y)
    return None if isinstance(other, Cases) or is_predicate(other) else sympy.expand(other - e)


@rule("__xor__", "bitwise_xor", "logical_xor")
def exclusive(r: Reader, x: Operand, y: Operand) -> Expression | None:
    a, b = r.aligned(x), r.aligned(y)
    if not (is_predicate(a) and is_predicate(b)):
        return None
    return sympy.Or(sympy.And(a, negate(b)), sympy.And(negate(a), b))


@rule("__and__", "bitwise_and", "logical_and")
def conjunction(r: Reader, x: Operand, y: Operand) -> Expression | None:
    a, b = r.aligned(x), r.aligned(y)
    return sympy.And(a, b) if is_predicate(a) and is_predicate(b) else None


@rule("__or__", "bitwise_or", "logical_or")
def disjunction(r: Reader, x: Operand, y: Operand) -> Expression | None:
    a, b = r.aligned(x), r.aligned(y)
    return sympy.Or(a, b) if is_predicate(a) and is_predicate(b) else None


@rule("bitwise_not", "logical_not", "__invert__")
def inversion(r: Reader, x: Operand) -> Expression | None:
    e = r.aligned(x)
    return negate(e) if is_predicate(e) else None


@rule("arange")
def arange(r: Reader, *args: object, **_: object) -> Expression | None:
    if len(args) > 2 or r.node.type.dtype.is_floating_point:
        return None
    start = args[0] if len(args) == 2 else 0
    return start + index(0)


@rule("full", "new_full")
def full(r: Reader, *args: float | sympy.Expr, **_: object) -> Expression | None:
    return literal(args[-1], r.node.type.dtype)


@rule("ones", "new_ones", "ones_like")
def ones(r: Reader, *_: object, **__: object) -> Expression | None:
    return literal(1, r.node.type.dtype)


@rule("zeros", "new_zeros", "zeros_like")
def zeros(r: Reader, *_: object, **__: object) -> Expression | None:
    return literal(0, r.node.type.dtype)


@rule("full_like")
def full_like(r: Reader, x: Ref, value: float | sympy.Expr, **_: object) -> Expression | None:
    return literal(value, r.node.type.dtype)


@rule("to", "_to_copy")
def cast(r: Reader, x: Ref, *_: object, **__: object) -> Expression | None:
    return as_dtype(r.env[x], r.node.type.dtype)


@rule("alias", "clone", "detach", "contiguous", "lift_fresh_copy")
def same(r: Reader, x: Ref, *_: object, **__: object) -> Expression | None:
    return r.env[x]


@rule("where")
def where(r: Reader, p: Operand, x: Operand, y: Operand) -> Expression | None:
    e, a, b = r.aligned(p), r.aligned(x), r.aligned(y)
    return _selected(r, e, a, b)


@rule("masked_fill")
def masked_fill(r: Reader, x: Operand, p: Operand, value: Operand) -> Expression | None:
    return _selected(r, r.aligned(p), r.aligned(value), r.aligned(x))


def _selected(r: Reader, p: Expression, a: Expression, b: Expression) -> Expression | None:
    x, y = (as_dtype(e, r.node.type.dtype) for e in (a, b))
    if not is_predicate(p):
        return None
    if isinstance(x, Cases) and isinstance(y, Cases):
        return select_float(p, x, y)
    return select(p, x, y) if is_predicate(x) and is_predicate(y) else None


@rule("tril", "triu")
def triangle(r: Reader, x: Ref, diagonal: int = 0) -> Expression | None:
    sign = 1 if r.node.op._schema.name.endswith("tril") else -1
    keep = nonnegative(sign * (index(r.rank - 2) + diagonal - index(r.rank - 1)))
    e = r.env[x]
    if is_predicate(e):
        return sympy.And(keep, e)
    return select_float(keep, e, Cases(((0.0, TRUE),))) if isinstance(e, Cases) else None


@rule("unsqueeze")
def unsqueeze(r: Reader, x: Ref, dim: int) -> Expression | None:
    dim %= r.rank
    return moved(r.env[x], {d: d + (d >= dim) for d in reversed(range(r.rank - 1))})


@rule("expand", "broadcast_to")
def expand(r: Reader, x: Ref, *_: object, **__: object) -> Expression | None:
    return r.aligned(x)


@rule("transpose")
def transpose(r: Reader, x: Ref, a: int, b: int) -> Expression | None:
    a, b = a % r.rank, b % r.rank
    return substitute(r.env[x], {index(a): index(b), index(b): index(a)})


@rule("permute")
def permute(r: Reader, x: Ref, order: Sequence[int]) -> Expression | None:
    return moved(r.env[x], {a % r.rank: b for b, a in enumerate(order)})


@rule("squeeze")
def squeeze(r: Reader, x: Ref, dim: int | Sequence[int] | None = None) -> Expression | None:
    shape = r.shape(x)
    dims = range(len(shape)) if dim is None else (dim,) if isinstance(dim, int) else dim
    gone = {d % len(shape) for d in dims if shape[d] == 1}
    kept = [d for d in range(len(shape)) if d not in gone]
    return moved(r.env[x], {a: b for b, a in enumerate(kept)})


@rule("select")
def select_(r: Reader, x: Ref, dim: int, at: Size) -> Expression | None:
    rank = len(r.shape(x))
    dim %= rank
    if isinstance(at, int) and at < 0:
        at = r.shape(x)[dim] + at
    to = {index(d): index(d - 1) for d in range(dim + 1, rank)}
    return substitute(r.env[x], {index(dim): sympy.sympify(at), **to})


@rule("view", "reshape", "_unsafe_view")
def view(r: Reader, x: Ref, *_: object, **__: object) -> Expression | None:
    """Where only dims of size 1 come or go."""
    before, after = (
        [d for d, n in enumerate(shape) if n != 1] for shape in (r.shape(x), r.node.type.shape)
    )
    if [r.shape(x)[d] for d in before] != [r.node.type.shape[d] for d in after]:
        return None
    return moved(r.env[x], dict(zip(before, after)))


@rule("slice")
def slice_(
    r: Reader, x: Ref, dim: int = 0, start: Size | None = 0, end: object = None, step: int = 1
) -> Expression | None:
    start = start or 0
    size = r.shape(x)[dim % r.rank]
    if isinstance(start, int) and start < 0:
        start = size + start
    elif start != 0 and not (isinstance(start, int) and isinstance(size, int)):
        return None  # a symbolic size could be less than the start
    return substitute(r.env[x], {index(dim % r.rank): start + step * index(dim % r.rank)})


@rule("index")
def gather(r: Reader, x: Ref, indices: Sequence[Ref | None]) -> Expression | None:
    """x[i, j] with an integer index for every dim."""
    if any(i is None for i in indices) or len(indices) != len(r.shape(x)):
        return None
    at = {}
    for d, i in enumerate(i for i in indices if i is not None):
        e = r.aligned(i)
        if isinstance(e, Cases) or is_predicate(e) or not e.is_nonnegative:
            return None
        at[index(d)] = e
    return substitute(r.env[x], at)


@rule("cumsum")
def cumsum(r: Reader, x: Ref, dim: int, **_: object) -> Expression | None:
    e = r.env[x]
    if e == FALSE:
        return sympy.Integer(0)
    return None


@rule("diff")
def diff(
    r: Reader,
    x: Ref,
    order: int = 1,
    dim: int = -1,
    prepend: Ref | None = None,
    append: Ref | None = None,
) -> Expression | None:
    """Where the first difference equals all others."""
    if order != 1 or prepend is None or append is not None or r.shape(prepend)[dim] != 1:
        return None
    k = index(dim % r.rank)
    e, before = r.env[x], r.env[prepend]
    if not is_number(e) or not is_number(before):
        return None
    change = sympy.expand(e - substitute(e, {k: k - 1}))
    first = sympy.expand(substitute(e, {k: sympy.Integer(0)}) - before)
    return change if change == first else None
