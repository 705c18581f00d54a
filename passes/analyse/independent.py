"""Values in a region that its factor does not touch, though they are cut from some that it does:
K and V of one head, in one weight with all queries.

In: the analysis and a region. Out: those values, and the ops that make them. They are no part of
the fold's result: `fold` makes them apart, once (docs/design.md, "Regions and folds").
"""

from __future__ import annotations

from collections.abc import Mapping

from tspc.factors.factor import Factor
from tspc.ir.program import Ref
from tspc.ops.attention import ATTENTION
from tspc.passes.analyse.factorize import Analysis, Record
from tspc.passes.analyse.regions import Region


def independent(r: Record, f: Factor) -> set[int]:
    """Results of an op on a value with the factor that are made of its other segments."""
    if f in r.roles or not any(f in c for c in r.carried_in):
        return set()
    return {i for i, c in enumerate(r.carried_out) if f not in c and r.node.types[i] is not None}


def is_independent(ref: Ref, makers: Mapping[str, Record], g: Region) -> bool:
    """The value is made in the region, apart from its factor, and can be made without its fold."""
    r, f = makers.get(ref.name), g.factor
    if r is None or (ref.item or 0) not in independent(r, f):
        return False
    for x in makers_of(ref, makers, f):
        if x.node.op == ATTENTION or f in x.roles:
            return False
        for operand, carried in zip(x.refs, x.carried_in):
            is_inside = operand is None or operand.name in makers or operand.name in g.weights
            if not is_inside and f in carried:
                return False
    return True


def makers_of(ref: Ref, makers: Mapping[str, Record], f: Factor) -> list[Record]:
    """The ops with the factor behind a value, in order."""
    reached: dict[int, Record] = {}
    todo = [ref.name]
    while todo:
        r = makers.get(todo.pop())
        if r is None or r.index in reached:
            continue
        if not any(f in c for c in (*r.carried_in, *r.carried_out)):
            continue
        reached[r.index] = r
        todo += [x.name for x in r.refs if x is not None]
    return [reached[i] for i in sorted(reached)]


def makers_in(a: Analysis, g: Region) -> dict[str, Record]:
    """Name -> record of the region's ops."""
    return {a.records[i].node.name: a.records[i] for i in g.ops}
