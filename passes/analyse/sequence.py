"""The factors of the sequences of a program: one, or more of which no value has two.

In: the analysis. Out: what attention exchanges, else the token factor of most values. Encoder
states and decoder tokens are sequences of their own length and layout, cut over the same ranks;
every value that has one is cut along it, so its placement needs no name of the sequence. They meet
in attention only, where queries are of one and keys of the same or another; any other op that
would meet two runs whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from tspc.factors.factor import Factor, const
from tspc.ir.program import OUTPUT, PARAM
from tspc.ops.attention import ATTENTION
from tspc.passes.analyse.factorize import Analysis, Record
from tspc.passes.analyse.regions import weight_values


def sequences(a: Analysis) -> tuple[Factor, ...]:
    """The main one first; empty where the program has none, or all of it is refused."""
    if a.records and all(r.node.name in a.refused or r.node.op == OUTPUT for r in a.records):
        return ()
    counts: dict[Factor, int] = defaultdict(int)
    exchanged: dict[Factor, int] = defaultdict(int)
    for r in a.records:
        for f in _exchanged(a, r):
            exchanged[f] += 1
        for f in set().union(*r.carried_out):
            if f.image_of is None and f not in exchanged:
                counts[f] += 1
    in_params = {
        f for n in a.program.nodes if n.op == PARAM for d in a.env[n.name, 0] for f in a.F.leaves(d)
    }
    if exchanged:  # attention over heads or features exchanges a factor of a weight
        ordered = sorted(exchanged, key=lambda f: (f in in_params, -exchanged[f]))
        return _apart(a, [*ordered, *_queries(a)])
    tokens = _token_factors(a)
    tokens = tokens - in_params or tokens  # a table of positions may be as long as the sequence
    tokens = {f for f in tokens if not const(f.size)} or tokens
    return (max(tokens, key=lambda f: counts[f]),) if tokens else ()


def _exchanged(a: Analysis, r: Record) -> set[Factor]:
    """Of keys and values, not of a mask."""
    of = (1, 2) if r.node.op == ATTENTION else None
    return {
        _original(a, f)
        for f, roles in r.roles.items()
        if any(x[0] == "exchange" and (of is None or x[1] in of) for x in roles)
    }


def _queries(a: Analysis) -> list[Factor]:
    """What attends but is not attended to."""
    out: dict[Factor, None] = {}
    for r in a.records:
        if r.node.op == ATTENTION and len(r.ins[0]) == 4:
            q = a.F.expand(tuple(r.ins[0][-2]))
            if len(q) == 1 and not q[0].cat:
                out[q[0]] = None
    return list(out)


def _apart(a: Analysis, candidates: list[Factor]) -> tuple[Factor, ...]:
    """The first, and those that no value has together with one before."""
    chosen: list[Factor] = []
    for f in candidates:
        beside = {
            g
            for r in a.records
            for ref, carried in (*zip(r.refs, r.carried_in), *((r, c) for c in r.carried_out))
            if f in carried and ref is not None
            for g in carried
        }
        if f not in chosen and not beside & set(chosen):
            chosen.append(f)
    return tuple(chosen)


def attends(a: Analysis, r: Record, leaves: Collection[Factor]) -> bool:
    """An attention, batched over two dims, whose queries and keys are sequences as a whole; causal
    along one only."""
    if len(r.ins[0]) != 4 or len(r.ins[1]) != 4:
        return False
    q, k = (a.F.expand(tuple(d[-2])) for d in r.ins[:2])
    causal = any(role == "at" for roles in r.roles.values() for role, *_ in roles)
    whole = all(len(x) == 1 and x[0] in leaves for x in (q, k))
    return whole and (q == k or not causal)


def masks_by_key(a: Analysis, r: Record, leaves: Collection[Factor]) -> bool:
    """The mask of an attention is made of values that are cut along the keys."""
    mask = r.ins[3] if len(r.ins) > 3 else None
    return bool(mask) and any(f in leaves for f in a.F.leaves(tuple(mask[-1])))


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
