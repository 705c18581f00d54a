"""Regions that no order of folds can run: what leaves one leads back into it.

In: the records of an analysis and the regions chosen. Out: those of them on a cycle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from tspc.ir.program import Ref
from tspc.passes.analyse.factorize import Record
from tspc.passes.analyse.independent import is_independent, makers_of
from tspc.passes.analyse.regions import Region


def entangled(recs: list[Record], regions: Sequence[Region]) -> list[Region]:
    """The regions that cannot each be one node: a path leads from one back into it, through
    others."""
    holders: dict[int, list[int]] = {}
    for k, g in enumerate(regions):
        for i in g.ops:
            holders.setdefault(i, []).append(-1 - k)
    holders_of = {r.node.name: holders.get(r.index, [r.index]) for r in recs}
    makers = [{recs[i].node.name: recs[i] for i in g.ops} for g in regions]

    def sources(x: Ref | None) -> list[int]:
        """What a value waits for: of one that is made apart, what it is made of."""
        out: list[int] = []
        for source in holders_of.get(x.name, []) if x is not None else []:
            k = -1 - source
            if x is None or k < 0 or not is_independent(x, makers[k], regions[k]):
                out.append(source)
                continue
            for r in makers_of(x, makers[k], regions[k].factor):
                outside = [y for y in r.refs if y is not None and y.name not in makers[k]]
                out += [n for y in outside for n in holders_of.get(y.name, [])]
        return out

    after: dict[int, set[int]] = defaultdict(set)
    before: dict[int, set[int]] = defaultdict(set)
    for r in recs:
        for x in r.refs:
            reached = sources(x)
            for to in holders.get(r.index, [r.index]):
                if to in reached:  # it reads what it makes itself
                    continue
                for source in reached:
                    after[source].add(to)
                    before[to].add(source)
    left = _on_cycles(before, after)
    return [g for k, g in enumerate(regions) if -1 - k in left]


def _on_cycles(before: dict[int, set[int]], after: dict[int, set[int]]) -> set[int]:
    """What is left without what no cycle leads to, or from. Empties the arrows."""
    left = {*after, *before}
    for one, other in ((before, after), (after, before)):
        todo = [n for n in left if not one[n]]
        while todo:
            n = todo.pop()
            left.discard(n)
            for m in other.pop(n, set()):
                one[m].discard(n)
                if not one[m] and m in left:
                    todo.append(m)
    return left
