"""The factor of the sequence.

In: the analysis. Out: what attention exchanges, else the token factor of most values.
"""

from __future__ import annotations

from collections import defaultdict

from tspc.passes.factorize import Analysis, Record
from tspc.passes.regions import weight_values

from tspc.factor import Factor, const
from tspc.program import PARAM


def sequence(a: Analysis) -> Factor | None:
    """The factor of the sequence: what attention exchanges, else the symbolic token factor of
    most float values."""
    counts: dict[Factor, int] = defaultdict(int)
    exchanged: dict[Factor, int] = defaultdict(int)
    for r in a.records:
        for f, roles in r.roles.items():
            if any(role == "exchange" for role, *_ in roles):
                exchanged[_original(a, f)] += 1
        for f in set().union(*r.carried_out):
            if f.image_of is None and f not in exchanged:
                counts[f] += 1
    in_params = {
        f for n in a.program.nodes if n.op == PARAM for d in a.env[n.name, 0] for f in a.F.leaves(d)
    }
    if exchanged:  # attention over heads or features exchanges a factor of a weight
        return max(exchanged, key=lambda f: (f not in in_params, exchanged[f]))
    tokens = _token_factors(a)
    tokens = tokens - in_params or tokens  # a table of positions may be as long as the sequence
    tokens = {f for f in tokens if not const(f.size)} or tokens
    return max(tokens, key=lambda f: counts[f], default=None)


def attends_along(a: Analysis, r: Record, leaf: Factor) -> bool:
    """The keys of an attention are the sequence as a whole, batched over two dims."""
    keys = r.ins[1]
    return len(keys) == 4 and a.F.expand(tuple(keys[-2])) == (leaf,)


def _original(a: Analysis, f: Factor) -> Factor:
    return a.F.find(f.image_of) if f.image_of is not None else f


def _token_factors(a: Analysis) -> set[Factor]:
    """Minor factors of what is contracted with a weight: the last token dim."""
    out = set()
    weights = weight_values(a)
    for r in a.records:
        weight = [x is not None and x.name in weights for x in r.refs]
        summed = {f for f, rs in r.roles.items() if any(x[0] == "reduce" for x in rs)}
        if not any(weight) or all(weight) or not summed:
            continue
        free = set().union(*(c for c, w in zip(r.carried_in, weight) if not w)) - summed
        for c, w in zip(r.carried_in, weight):
            free -= c if w else set()
        for dims in r.outs:
            out |= set([f for d in dims for f in a.F.leaves(d) if f in free][-1:])
    return out
