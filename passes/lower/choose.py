"""Choose what is folded, how every parameter is stored, and the layout of the sequence.

In: the analysis and its candidate regions. Out: `Choice`. A region is refused, with its reason,
where a fold cannot run it; its weights are then gathered at use.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch

from tspc.base.errors import OptionError
from tspc.factors.factor import Dims, Factor, const
from tspc.factors.placement import indices
from tspc.ir.body import Extent
from tspc.ir.program import OUTPUT, PARAM, Node, casts_of_parameters
from tspc.ir.shard import ShardMap, chunked
from tspc.masks.predicate import ANY, truth
from tspc.ops.attention import ATTENTION, bound
from tspc.passes.analyse.cycles import entangled
from tspc.passes.analyse.factorize import Analysis, Record, in_segment
from tspc.passes.analyse.independent import is_independent, makers_in
from tspc.passes.analyse.refused import NOTHING, Refused
from tspc.passes.analyse.regions import ENDS, Region, Regions, find_regions
from tspc.passes.analyse.sequence import attends, masks_by_key, sequences

aten = torch.ops.aten
FAR = 10**12  # a distance beyond every window
SMALL = 64 * 1024  # bytes: parameters of one dim below this are replicated
SCHEDULES = ("auto", "ring", "broadcast", "gather", "stationary")
FOLD, GATHER, REPLICATE = "fold", "gather", "replicate"
Users = Mapping[str, list[Record]]  # of each value


@dataclass(frozen=True)
class Storage:
    """How a parameter is stored: its shard in a fold, gathered at use, or replicated."""

    kind: str
    map: ShardMap | None = None


@dataclass(frozen=True)
class Choice:
    """What is folded, and how everything is stored.

    leaves: the factors of the sequences, each with the order of its layout. regions: (name, region,
    schedule). refused: (region, reason).
    """

    leaves: Mapping[Factor, str]
    regions: tuple[tuple[str, Region, str], ...]
    refused: tuple[tuple[Region, str], ...]
    storages: Mapping[str, Storage]
    lookups: frozenset[str]

    @property
    def leaf(self) -> Factor | None:
        """The main sequence."""
        return next(iter(self.leaves), None)

    @property
    def extents(self) -> tuple[Extent, ...]:
        """Of every sequence; of one row where there is none."""
        extents = tuple(Extent(f.size, order) for f, order in self.leaves.items())
        return extents or (Extent(1, "contiguous"),)


def choose(
    a: Analysis,
    ranks: int,
    schedule: str | Mapping[str, str] = "auto",
    layout: str = "auto",
    left_alone: Refused = NOTHING,
) -> Choice:
    """Decide which regions fold, on which schedule, and how parameters are stored.

    schedule: one name for all regions, or a dict from region name or glob. left_alone:
    regions not to fold, whatever they are.
    """
    leaves, users = sequences(a), _users(a)
    refused: list[tuple[Region, str]] = []

    def why_not(g: Region, regions: Regions) -> str:
        return left_alone.region(g.weights) or _why_not(
            a, g, leaves, users, _lookups(a, regions, leaves), regions
        )

    while True:  # a refused region makes way for others, and may take some with it
        regions = find_regions(a, leaves, {g.key for g, _ in refused})
        lookups = _lookups(a, regions, leaves)
        reasons = [(g, why_not(g, regions)) for g in regions.chosen]
        refused += [(g, why) for g, why in reasons if why]
        if any(why for _, why in reasons):
            continue
        few = _outgrown(regions, ranks, why_not)
        if few:
            refused += [(g, f"it has {g.factor.size} pieces for {ranks} ranks") for g in few]
            continue
        tied = entangled(a.records, regions.chosen)
        if not tied:
            break
        smallest = min(tied, key=lambda g: g.elements)
        refused.append((smallest, "what leaves it leads back into it"))
    chosen = regions.chosen
    names = _names(chosen)
    storages = _storages(a, chosen, lookups, ranks)
    schedules = _schedules(names, schedule, bool(left_alone))
    orders = {f: layout if layout != "auto" else _order(a, f) for f in leaves}
    picked = tuple(zip(names, chosen, schedules))
    return Choice(orders, picked, tuple(refused), storages, frozenset(lookups))


def _order(a: Analysis, leaf: Factor) -> str:
    """Of the layout of a sequence."""
    attentions = (r for r in a.records if r.node.op == ATTENTION and _is_uneven(r.node))
    return "zigzag" if any(leaf in r.carried_in[0] for r in attentions) else "contiguous"


def _outgrown(
    regions: Regions, ranks: int, why_not: Callable[[Region, Regions], str]
) -> list[Region]:
    """Those regions of fewer pieces than ranks in whose stead another is evenly cut: K/V heads, for
    the queries of each of them."""
    out: dict[int, Region] = {}
    for other, clash in regions.rejected:
        size, instead = int(other.factor.size), {id(g): g for g in clash}
        if other.leaks or other.phases > 1 or not other.exits or size % ranks or len(instead) > 1:
            continue
        for key, g in instead.items():
            small = int(g.factor.size) < ranks and other.ops <= g.ops
            small = small and g.elements <= 2 * other.elements
            kept = [x for x in regions.chosen if x is not g]
            kept += [x for x, _ in regions.rejected if x.factor is other.factor]
            if small and not why_not(other, replace(regions, chosen=kept)):
                out[key] = g
    return list(out.values())


def _is_uneven(n: Node) -> bool:
    """Later queries see more keys: none that are far ahead of them, but some far behind."""
    _, a = bound(n)
    unknown = [ANY] * len(a.sizes)

    def sees(q: int, k: int) -> bool:
        return all(truth(t, (q, q), (k, k), unknown) is not False for t in a.texts)

    return not sees(0, FAR) and sees(FAR, 0)


def _users(a: Analysis) -> dict[str, list[Record]]:
    """Who reads a value; a parameter is read by who reads its cast."""
    casts = casts_of_parameters(a.program.nodes)
    out: dict[str, list[Record]] = {}
    for r in a.records:
        if r.node.name in casts:
            continue
        for ref in {x.name for x in r.refs if x is not None}:
            out.setdefault(ref, []).append(r)
            if ref in casts:
                out.setdefault(casts[ref], []).append(r)
    return out


def _lookups(a: Analysis, regions: Regions, leaves: Collection[Factor]) -> dict[str, str]:
    """Embedding node -> its table, where the table is a parameter and the ids end in the
    sequence."""
    out = {}
    params = {n.name: n.name for n in a.program.nodes if n.op == PARAM}
    params |= casts_of_parameters(a.program.nodes)
    for _, r in regions.lookups:
        if r.node.op != aten.embedding.default:
            continue
        table, ids = r.refs[0], r.refs[1]
        if table is None or table.name not in params:
            continue
        token = r.outs[0][-2] if len(r.outs[0]) > 1 else ()
        whole = tuple(a.F.expand(token))
        if ids is not None and len(whole) == 1 and whole[0] in leaves:
            out[r.node.name] = params[table.name]
    return out


def _why_not(
    a: Analysis,
    g: Region,
    leaves: Collection[Factor],
    users: Users,
    lookups: Mapping[str, str],
    regions: Regions,
) -> str:
    """Why a fold cannot run the region, empty if it can."""
    if not leaves:
        return "the program has no sequence"
    params = {n.name: n for n in a.program.nodes if n.op == PARAM}
    results = {a.records[i].node.name for i in g.ops}
    if not any(len(params[w].type.shape) > 1 for w in g.weights):
        return "it has no weight of its own: it is computed from others"
    why = _used_elsewhere(a, g, users, lookups, regions)
    if why:
        return why
    of_weights = {*params, *a.program.replicated}  # made of nothing else: the same for all tokens
    for i in sorted(g.ops):
        r = a.records[i]
        if r.node.op != OUTPUT and all(x is None or x.name in of_weights for x in r.refs):
            of_weights.add(r.node.name)
        for k, dims in enumerate(r.outs):
            if not r.carried_out[k].intersection(leaves) and r.node.types[k] is not None:
                ends = any(role in ENDS for role, *_ in r.roles.get(g.factor, ()))
                ends = ends or any(u.node.op == OUTPUT for u in users.get(r.node.name, ()))
                if ends or r.node.name not in of_weights:
                    return f"{r.node.name} has no sequence"
            if any(in_segment(a.F, dims, leaf) for leaf in leaves):
                return f"the sequence is part of a dim of {r.node.name}"
        why = _needs_sequence(a, r, g, leaves) or _escapes(a, r, g, leaves, users, regions)
        why = why or _reads_pieces(a, r, g, leaves, results)
        if why:
            return why
        if r.node.op == ATTENTION and masks_by_key(a, r, leaves):
            return f"the mask of {r.node.name} is computed from its keys' tokens"
    return ""


def _used_elsewhere(
    a: Analysis, g: Region, users: Users, lookups: Mapping[str, str], regions: Regions
) -> str:
    """Where a weight of the region is read outside of the regions of its factor."""
    same = {i for other in regions.chosen if other.factor is g.factor for i in other.ops}
    for w, (dim, _, _) in g.weights.items():
        rows = dim == 0 and a.F.expand(tuple(a.env[w, 0][0])) == (g.factor,)
        for r in users.get(w, []):
            if r.index not in same and not (rows and r.node.name in lookups):
                return f"{w} is also used by {r.node.name}"
    return ""


def _needs_sequence(a: Analysis, r: Record, g: Region, leaves: Collection[Factor]) -> str:
    """What the op needs of other ranks' tokens, which only attention may."""
    sequences = set().union(*r.carried_in, *r.carried_out).intersection(leaves)
    roles = {role for leaf in sequences for role, *_ in r.roles.get(leaf, ())}
    if r.node.op == ATTENTION:
        if roles - {"at"} != {"exchange"} or not attends(a, r, leaves):
            return f"{r.node.name} does not attend along the sequence"
        if g.factor not in r.carried_in[0]:
            return f"{r.node.name} would compute the same weights for every piece of its values"
        return ""
    if len(sequences) > 1:
        return f"{r.node.name} meets two sequences"
    return f"{r.node.name} meets the sequence: {', '.join(sorted(roles))}" if roles else ""


def _escapes(
    a: Analysis,
    r: Record,
    g: Region,
    leaves: Collection[Factor],
    users: Users,
    regions: Regions,
) -> str:
    """Where a value of the region that still carries the factor is used outside of it and cannot
    leave it in pieces.

    Regions may share what they recompute: each user is then in a region that makes the value.
    """
    if any(role in ENDS for role, *_ in r.roles.get(g.factor, ())):
        return ""
    cut = (c.intersection(leaves) and _apart(a, d, g.factor) for c, d in zip(r.carried_out, r.outs))
    if all(cut):
        return ""
    same = [x.ops for x in regions.chosen if x.factor is g.factor and r.index in x.ops]
    results, makers = g.ops.union(*same), makers_in(a, g)
    for user in users.get(r.node.name, []):
        read = [x for x in user.refs if x is not None and x.name == r.node.name]
        if all(is_independent(x, makers, g) for x in read):
            continue
        if user.node.op != OUTPUT and user.index not in results:
            return f"{r.node.name} is also used by {user.node.name}"
    return ""


def _reads_pieces(
    a: Analysis, r: Record, g: Region, leaves: Collection[Factor], results: set[str]
) -> str:
    """An operand from outside with the sequence and the factor, of which no step can take its
    piece."""
    for ref, carried, dims in zip(r.refs, r.carried_in, r.ins):
        if ref is None or ref.name in results or g.factor not in carried:
            continue
        if carried.intersection(leaves) and not _apart(a, dims, g.factor):
            return f"{r.node.name} reads {ref.name}, which has the sequence and its columns"
    return ""


def _apart(a: Analysis, dims: Dims, f: Factor) -> bool:
    """The factor is in one dim, as a whole, with nothing beside it whose size may change."""
    hit = [a.F.expand(tuple(d)) for d in dims if f in a.F.leaves(tuple(d))]
    return len(hit) == 1 and hit[0].count(f) == 1 and all(const(x.size) for x in hit[0])


def _names(regions: list[Region]) -> list[str]:
    """The longest common module path of the weights; `#2` where two regions share it."""
    out: list[str] = []
    for g in regions:
        paths = [w.split(".")[:-1] for w in g.weights]
        common = paths[0]
        for p in paths[1:]:
            n = 0
            while n < min(len(p), len(common)) and p[n] == common[n]:
                n += 1
            common = common[:n]
        base = name = ".".join(common) or "model"
        k = 2
        while name in out:
            name, k = f"{base}#{k}", k + 1
        out.append(name)
    return out


def _schedules(names: list[str], schedule: str | Mapping[str, str], incomplete: bool) -> list[str]:
    """incomplete: a region that the schedule names may be refused."""
    if isinstance(schedule, str):
        return [schedule] * len(names)
    out = ["auto"] * len(names)
    for pattern, value in schedule.items():
        hit = [i for i, n in enumerate(names) if n == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not hit and not incomplete:
            raise OptionError(
                f"schedule: {pattern!r} matches no region; the regions are {', '.join(names)}"
            )
        for i in hit:
            out[i] = value
    return out


def _storages(
    a: Analysis, regions: list[Region], lookups: Mapping[str, str], ranks: int
) -> dict[str, Storage]:
    out: dict[str, Storage] = {}
    for g in regions:
        for w, (dim, _, role) in g.weights.items():
            if len(a.program.node(w).type.shape) > 1:
                out[w] = Storage(FOLD, fold_map(a, w, dim, g.factor, ranks, role == "column"))
    for table in lookups.values():
        if table not in out:
            out[table] = Storage(
                GATHER, chunked(0, int(a.program.node(table).type.shape[0]), ranks)
            )
    for n in a.program.nodes:
        if n.op != PARAM or n.name in out:
            continue
        shape = [int(s) for s in n.type.shape]
        size = n.type.dtype.itemsize
        for s in shape:
            size *= s
        if not shape or (len(shape) == 1 and size < SMALL):
            out[n.name] = Storage(REPLICATE)
        else:
            dim = max(range(len(shape)), key=lambda k: shape[k])
            out[n.name] = Storage(GATHER, chunked(dim, shape[dim], ranks))
    return out


def fold_map(
    a: Analysis, weight: str, dim: int, factor: Factor, ranks: int, column: bool
) -> ShardMap:
    """Units of the factor in order, in equal pieces; a pad repeats the last unit (column) or is
    zero (row)."""
    size = int(factor.size)
    units = -(-size // ranks)
    dims = a.env[weight, 0]
    rows, real = [], []
    for j in range(ranks):
        source = [min(j * units + i, size - 1) for i in range(units)]
        at = indices(a.F, dims[dim], factor, source)
        marks = _marks(a, dims[dim], factor, [j * units + i < size for i in range(units)])
        rows.append(tuple(r if m or column else -1 for r, m in zip(at, marks)))
        real.append(tuple(marks))
    return ShardMap(dim, tuple(rows), tuple(real))


def _marks(a: Analysis, dim: tuple[Factor, ...], f: Factor, real: list[bool]) -> list[bool]:
    """Per place of a shard, in the order of `indices`: is its unit real."""
    out = [True]
    for g in a.F.expand(tuple(dim)):
        if g is f:
            kept = real
        elif g.cat:
            kept = [m for d in a.F.flat(g.cat) for m in _marks(a, d, f, real)]
        else:
            kept = [True] * int(g.size)
        out = [x and y for x in out for y in kept]
    return out
