"""Regions from factor classes: ops joined by values that carry a factor of a weight
(docs/design.md, "Regions and folds").

In: the analysis. Out: the regions that may be cut, those that may not and why, the look-ups into
cut tables, and the parameters that no region covers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tspc.factors.factor import Factor, const
from tspc.ir.kinds import ALONG
from tspc.ir.program import OUTPUT, PARAM, PLACEHOLDERS
from tspc.passes.analyse.factorize import Analysis, Record
from tspc.seams.tensors import OpOverload

ENDS = ("reduce", "lse")
VIEWS = {
    "t",
    "numpy_T",
    "transpose",
    "to",
    "_to_copy",
    "view",
    "reshape",
    "permute",
    "contiguous",
    "alias",
    "detach",
}
LEAK = {"whole", "exchange", "twice", "trim", "at", *ALONG}


def is_view(op: OpOverload) -> bool:
    """The op makes one operand of a weight: a view or a cast."""
    return op._schema.name.split("::")[1] in VIEWS


@dataclass
class Region:
    """One factor in one component of ops.

    weights: name -> (dim, segments, "column" | "row").
    """

    factor: Factor
    exits: list[tuple[int, str]]  # (record index, kind)
    ops: set[int]
    weights: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    phases: int = 1
    leaks: list[tuple[str, str, str]] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    elements: int = 0
    is_open: bool = False  # a value in pieces leaves it or comes from elsewhere

    @property
    def key(self) -> tuple[Factor, int]:
        """Which candidate it is."""
        return self.factor, min(self.ops, default=-1)

    @property
    def kind(self):
        return "/".join(sorted({k for _, k in self.exits if k not in ("output", "leak")}))


def weight_values(a: Analysis) -> dict[str, str]:
    """Value -> the parameter that it is, through views and casts only."""
    out = {n.name: n.name for n in a.program.nodes if n.op == PARAM}
    for r in a.records:
        operands = [x.name for x in r.refs if x is not None]
        if len(operands) == 1 and operands[0] in out and r.node.op != OUTPUT and is_view(r.node.op):
            out[r.node.name] = out[operands[0]]
    return out


def numel(t):
    n = 1
    for s in t.shape:
        n *= s
    return n


@dataclass
class Regions:
    """All candidate regions of a program.

    rejected: with the chosen regions that they clash with. others: parameters outside of regions
    and look-ups.
    """

    chosen: list[Region]
    rejected: list[tuple[Region, list[Region]]]
    lookups: list[tuple[Factor, Record]]
    others: list[str]


class End(NamedTuple):
    """Where a factor ends: in an output, a sum, a place that needs it whole (a leak), ..."""

    record: Record
    kind: str
    why: str = ""


LOOKUP = "lookup"  # of rows of a weight


def find_regions(
    a: Analysis, leaves: Collection[Factor], refused: Container[tuple[Factor, int]] = ()
) -> Regions:
    """All candidate regions; the choice takes those with most weight elements first.

    leaves: the sequences. refused: (factor, first op) of candidates that are not to be chosen.
    """
    recs, weight_of = a.records, weight_values(a)
    params = {n.name: n.type for n in a.program.nodes if n.op == PARAM}
    types = {n.name: n.type for n in a.program.nodes if n.op in PLACEHOLDERS}
    carriers: dict[Factor, list[Record]] = defaultdict(list)
    readers: dict[str, list[Record]] = defaultdict(list)
    for r in recs:
        for f in set().union(*r.carried_in, *r.carried_out):
            carriers[f].append(r)
        for x in r.refs:
            if x is not None:
                readers[x.name].append(r)
    in_params = dict.fromkeys(f for n in params for d in a.env[n, 0] for f in a.F.leaves(d))
    regions: list[Region] = []
    lookups: list[tuple[Factor, Record]] = []
    for f in in_params:
        if not const(f.size) or f.size < 2:
            continue
        ends: list[End] = []
        for r in carriers[f]:
            end = _end(r, f, weight_of)
            if end is not None and end.kind == LOOKUP:
                lookups.append((f, r))
            elif end is not None:
                ends.append(end)
        for ops, here in components(f, carriers[f], ends, a.makers, weight_of):
            g = _region(f, ops, here, recs)
            describe(a, g, recs, weight_of, types)
            g.is_open = opened(a, g, recs, readers, leaves)
            parts = [] if g.leaks or g.phases < 2 else phases(g, recs, leaves)
            for part in parts:
                part.is_open = g.is_open
                describe(a, part, recs, weight_of, types)
            regions += parts or [g]
    chosen, rejected = _chosen(regions, recs, weight_of, refused)
    tables = {x.name for _, r in lookups if (x := r.refs[0]) is not None}
    covered = {n for g in chosen for n in g.weights} | {weight_of.get(t, t) for t in tables}
    return Regions(chosen, rejected, lookups, [n for n in params if n not in covered])


def _end(r: Record, f: Factor, weight_of: Mapping[str, str]) -> End | None:
    """How a factor ends in an op."""
    roles = r.roles.get(f, set())
    kinds = {role for role, *_ in roles}
    if r.node.op == OUTPUT:
        return End(r, "output")
    if kinds & LEAK:
        reasons = sorted({f"{role} {why}".strip() for role, _, why in roles if role in LEAK})
        return End(r, "leak", "; ".join(reasons))
    if "select" in kinds:
        picked = [r.refs[i] for role, i, _ in roles if role == "select" and i is not None]
        table = any(x is not None and x.name in weight_of for x in picked)
        return End(r, LOOKUP) if table else End(r, "leak", "select")
    return End(r, (kinds & set(ENDS)).pop()) if kinds & set(ENDS) else None


def _region(f: Factor, ops: set[int], ends: Sequence[End], recs: list[Record]) -> Region:
    leaks = [e for e in ends if e.kind == "leak"]
    inside = {o for o in ops if recs[o].node.op != OUTPUT} - {e.record.index for e in leaks}
    g = Region(f, [(e.record.index, e.kind) for e in ends if e.kind != "leak"], inside)
    g.leaks = [(e.record.node.name, e.record.node.op, e.why) for e in leaks]
    outputs = [e.record for e in ends if e.kind == "output"]
    g.outputs = sorted({str(x) for r in outputs for x, c in zip(r.refs, r.carried_in) if f in c})
    return g


def _chosen(
    candidates: list[Region],
    recs: list[Record],
    weight_of: Mapping[str, str],
    refused: Container[tuple[Factor, int]],
) -> tuple[list[Region], list[tuple[Region, list[Region]]]]:
    """The regions that clash with none before them, and the others with those."""
    candidates.sort(
        key=lambda g: (bool(g.leaks), g.phases > 2, g.is_open, -g.elements, g.phases, min(g.ops))
    )
    chosen: list[Region] = []
    taken: dict[tuple[int, str], Region] = {}
    rejected: list[tuple[Region, list[Region]]] = []
    for g in candidates:
        uses = {
            (o, x.name)
            for o in g.ops
            for x, c in zip(recs[o].refs, recs[o].carried_in)
            if x and x.name in weight_of and g.factor in c
        }
        clash = [taken[u] for u in uses if u in taken and taken[u].factor is not g.factor]
        if g.leaks or g.phases > 1 or not g.exits or clash or g.key in refused:
            rejected.append((g, clash))
            continue
        for u in uses:
            taken[u] = g
        chosen.append(g)
    return sorted(chosen, key=lambda g: min(g.ops)), rejected


class _Groups:
    """Ops that are one component: a union of those that were joined."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i


def components(
    f: Factor,
    carrying: Sequence[Record],
    ends: Sequence[End],
    makers: Mapping[str, Record],
    weight_of: Mapping[str, str],
) -> Iterator[tuple[set[int], list[End]]]:
    """Ops joined by values that carry f and come from a column op (a weight with f contracted
    with something else).

    What carries f without that (a bias table, a view of a weight) is recomputed in every
    component that reads it, unless it is made by an op that needs f whole.
    """
    sources = {
        r.index: [
            makers[x.name]
            for x, c in zip(r.refs, r.carried_in)
            if x and f in c and x.name in makers
        ]
        for r in carrying
    }
    groups = _Groups()
    for r in carrying:
        live = [s.index for s in sources[r.index] if s.index in groups.parent]
        if not live and not _is_column(r, f, weight_of):
            continue
        groups.parent.setdefault(r.index, r.index)
        for s in live if r.node.op != OUTPUT else ():
            groups.parent[groups.root(r.index)] = groups.root(s)
    members: dict[int, set[int]] = defaultdict(set)
    closing: dict[int, list[End]] = defaultdict(list)
    for i in groups.parent:
        members[groups.root(i)].add(i)
    for e in ends:
        at = [s.index for s in sources[e.record.index]]
        for i in at if e.record.node.op == OUTPUT else [e.record.index]:
            if i in groups.parent:
                closing[groups.root(i)].append(e)
    for k, here in closing.items():
        ops, stack = set(), list(members[k])
        while stack:
            o = stack.pop()
            if o in ops or o not in sources:
                continue
            ops.add(o)
            stack += [
                s.index for s in sources[o] if s.index not in groups.parent and f not in s.roles
            ]
        yield ops, here


def _is_column(r: Record, f: Factor, weight_of: Mapping[str, str]) -> bool:
    weight = any(f in c and x and x.name in weight_of for x, c in zip(r.refs, r.carried_in))
    contracts = any(role == "reduce" for g, rs in r.roles.items() if g is not f for role, *_ in rs)
    return weight and contracts and any(f in c for c in r.carried_out)


def opened(
    a: Analysis,
    g: Region,
    recs: list[Record],
    readers: Mapping[str, list[Record]],
    leaves: Collection[Factor],
) -> bool:
    """A value with the factor leaves the region but for its exits, or comes from elsewhere with the
    sequence."""
    f, results = g.factor, {recs[o].node.name for o in g.ops}
    for r in (recs[o] for o in g.ops):
        inside = not {role for role, *_ in r.roles.get(f, ())} & set(ENDS)
        if inside and any(
            x.index not in g.ops and x.node.op != OUTPUT for x in readers[r.node.name]
        ):
            return True
        for x, carried in zip(r.refs, r.carried_in):
            replicated = x is None or x.name in results or x.name in a.program.replicated
            if not replicated and f in carried and carried.intersection(leaves):
                return True
    return False


def phases(g: Region, recs: list[Record], leaves: Collection[Factor]) -> list[Region]:
    """A region with a sum midway (a norm over all heads) as two: what makes the sums and what reads
    them. The values that both need leave the first in pieces and are read so by the second.

    Each may have phases of its own.
    """
    ends = {i for i, kind in g.exits if kind != "output"}
    behind: dict[str, set[int]] = {}  # value -> the exits that it depends on
    back: set[int] = set()
    for o in range(min(g.ops), max(g.ops) + 1):
        r = recs[o]
        before = set().union(*(behind.get(x.name, set()) for x in r.refs if x))
        if o in g.ops:
            back |= before
        behind[r.node.name] = before | ({o} if o in ends else set())
    makers = {recs[o].node.name: o for o in g.ops}
    first = {o for o in back if not behind[recs[o].node.name] - {o}}
    todo = list(first)
    while todo:
        for x in recs[todo.pop()].refs:
            o = makers.get(x.name) if x else None
            if o is not None and o not in first:
                first.add(o)
                todo.append(o)
    later = g.ops - first
    todo = list(later)
    while todo:  # what has no sequence cannot leave: it is recomputed
        for x in recs[todo.pop()].refs:
            o = makers.get(x.name) if x else None
            cut = o in first and set().union(*recs[o].carried_out).intersection(leaves)
            if o in first and o not in later and not cut:
                later.add(o)
                todo.append(o)
    out = []
    for ops in (first, later):
        exits = [(i, kind) for i, kind in g.exits if kind == "output" or i in ops]
        out.append(Region(g.factor, exits, ops, outputs=g.outputs))
    return out


def describe(a, g, recs, weight_of, types):
    F, f = a.F, g.factor
    exit_at = {i for i, k in g.exits if k != "output"}
    for o in sorted(g.ops):
        r = recs[o]
        for i, (x, c) in enumerate(zip(r.refs, r.carried_in)):
            if x is None:
                continue
            if f in c and x.name in weight_of:
                w = weight_of[x.name]
                role = (
                    "row"
                    if any(k == "reduce" and j == i for k, j, _ in r.roles.get(f, ()))
                    else "column"
                )
                for k, d in enumerate(a.env[w, 0]):
                    n = sum(q is f for q in F.leaves(d))
                    if n:
                        g.weights[w] = (k, n, role)
    g.elements = sum(numel(types[w]) for w in g.weights)
    if not g.ops:
        return
    level, lo, hi = {}, min(g.ops), max(g.ops)
    for o in range(
        lo, hi + 1
    ):  # a path from an exit back into the region costs one more pass over the shards
        r = recs[o]
        n = max([level.get(x.name, 0) for x in r.refs if x], default=0)
        if o in g.ops:
            g.phases = max(g.phases, n + 1)
        if o in exit_at:
            n += 1
        if n:
            level[r.node.name] = n
