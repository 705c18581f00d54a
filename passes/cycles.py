"""Regions that no order of folds can run: what leaves one leads back into it.

In: the records of an analysis and the regions chosen. Out: those of them on a cycle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from tspc.passes.factorize import Record
from tspc.passes.regions import Region


def entangled(recs: list[Record], regions: Sequence[Region]) -> list[Region]:
    """Regions that cannot each be one node: a path leads from one back into it, through others."""
    holders: dict[int, list[int]] = {}
    for k, g in enumerate(regions):
        for i in g.ops:
            holders.setdefault(i, []).append(-1 - k)
    made = {r.node.name: holders.get(r.index, [r.index]) for r in recs}
    after: dict[int, set[int]] = defaultdict(set)
    before: dict[int, set[int]] = defaultdict(set)
    for r in recs:
        for x in r.refs:
            sources = made.get(x.name, []) if x is not None else []
            for to in holders.get(r.index, [r.index]):
                if to in sources:  # it reads what it makes itself
                    continue
                for source in sources:
                    after[source].add(to)
                    before[to].add(source)
    left = {*after, *before}
    for one, other in (
        (before, after),
        (after, before),
    ):  # off with what no cycle leads to, or from
        todo = [n for n in left if not one[n]]
        while todo:
            n = todo.pop()
            left.discard(n)
            for m in other.pop(n, set()):
                one[m].discard(n)
                if not one[m] and m in left:
                    todo.append(m)
    return [g for k, g in enumerate(regions) if -1 - k in left]
