"""Make a dim that ops lay together and attention reads as one a sequence of its own.

In: a normalized program. Out: its analysis. A class token and patches joined by `cat`, or rows and
columns of patches flattened, are a sum or product of factors, of which no layout is the layout of
the whole: the op that makes the dim is sealed, its result is a fresh factor. The op itself runs
whole and is reported; what follows is cut along the new factor.
"""

from __future__ import annotations

from collections.abc import Container

from tspc.factors.factor import Factor
from tspc.ir.program import OUTPUT, Program
from tspc.ops.attention import ATTENTION
from tspc.passes.analyse.factorize import Analysis, factorize

Sealed = dict[str, tuple[tuple[int, int], ...]]


def analyse(program: Program, refused: Container[str] = ()) -> Analysis:
    """The factors of a program, those of attention's queries and keys as leaves where they can
    be. refused: nodes that run as a whole."""
    sealed: Sealed = {}
    while True:
        a = factorize(program, sealed, refused)
        more = _makers(a, _composed(a))
        if not more:
            return a
        for n, at in more.items():
            pairs: tuple[tuple[int, int], ...] = sealed.get(n, ())
            sealed = {**sealed, n: (*pairs, *at)}


def _composed(a: Analysis) -> set[tuple[Factor, ...]]:
    """Dims of several factors along which queries and keys of one attention lie."""
    out = set()
    for r in a.records:
        if r.node.op == ATTENTION and len(r.ins[0]) > 1:
            q, k = (a.F.expand(d[-2]) for d in r.ins[:2])
            if q == k and (len(q) > 1 or (q and q[0].cat)):
                out.add(q)
    return out


def _makers(a: Analysis, composed: set[tuple[Factor, ...]]) -> Sealed:
    """The ops that make such a dim of others."""
    out: Sealed = {}
    for r in a.records if composed else ():
        if r.node.op == OUTPUT:
            continue
        operand_dims = {a.F.expand(tuple(d)) for dims in r.ins for d in dims}
        new_dims = [
            (item, k)
            for item, dims in enumerate(r.outs)
            for k, d in enumerate(dims)
            if (e := a.F.expand(tuple(d))) in composed and e not in operand_dims
        ]
        fresh = tuple(x for x in new_dims if x not in a.sealed.get(r.node.name, ()))
        if fresh:
            out[r.node.name] = fresh
    return out
