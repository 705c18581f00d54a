"""Where a decision comes from: what is known of one name of a rewritten program, as text.

A name is a region's, a parameter's or a value's.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from tspc.base.errors import PlanError
from tspc.cost.model import seconds
from tspc.ir.kinds import CONVERSIONS
from tspc.ir.program import FOLD, PARAM, Node, Ref
from tspc.passes.analyse.fold import Fold
from tspc.passes.lower.unit import Unit

PLACED = {
    "R": "equal on all ranks",
    "S": "cut along the sequence",
    "P": "a partial sum on each rank",
    "V": "equal on all ranks, its cotangents differ",
}


def origin(rewritten: Unit, name: str, sizes: Mapping[sympy.Symbol, int]) -> str:
    """sizes: of the symbols. Raises `PlanError` for an unknown name."""
    name = name.removeprefix("%")
    for node in rewritten.folds:
        if name in (node.kwargs["fold"].name, node.name):
            return "\n  ".join(_region(rewritten, node, sizes))
    for n in rewritten.typed.program.nodes:
        if n.name == name:
            return "\n  ".join(_parameter(rewritten, n) if n.op == PARAM else _value(rewritten, n))
    for node in rewritten.folds:
        fold: Fold = node.kwargs["fold"]
        if any(n.name == name for n in fold.body):
            return f"%{name} is computed inside of region {fold.name}, for one shard at a time"
    named = ", ".join(n.kwargs["fold"].name for n in rewritten.folds)
    raise PlanError(
        f"no region, parameter or value {name!r} in this program; its regions are {named or 'none'}"
    )


def _op(n: Node) -> str:
    return n.op if isinstance(n.op, str) else n.op._schema.name.split("::")[1]


def _region(rewritten: Unit, node: Node, sizes: Mapping[sympy.Symbol, int]) -> list[str]:
    fold: Fold = node.kwargs["fold"]
    body = rewritten.bodies[fold.name]
    pads = fold.units * body.ranks - fold.size
    out = [
        f"region {fold.name}: sums over {fold.size} pieces of {fold.factor.origin or 'a dim'}, "
        f"{fold.units} in each of {body.ranks} shards" + (f", {pads} of them pads" if pads else "")
    ]
    storages = rewritten.choice.storages
    for w in fold.weights:
        m = storages[w].map
        out.append(f"weight {w}: " + (f"cut along dim {m.dim}" if m else "equal on all ranks"))
    out += [f"%{n.name} = {_op(n)} {n.source}" for n in fold.body]
    out += [f"leaves as a {e.kind}: {e.ref!r}" for e in fold.exits]
    asked = {name: schedule for name, _, schedule in rewritten.choice.regions}[fold.name]
    if asked != "auto":
        return [*out, f"schedule {asked}, by the options"]
    rows = [int(e.rows(body.ranks, sizes)) * body.ranks for e in body.extents]
    times = seconds(body, [sizes[s] for s in body.symbols], *rows)
    schedules = ", ".join(
        f"{n} {t * 1e3:.3g} ms" for n, t in sorted(times.items(), key=lambda x: x[1])
    )
    return [
        *out,
        f"schedule of the least time a step at these sizes, by the cost model: {schedules}",
    ]


def _parameter(rewritten: Unit, n: Node) -> list[str]:
    storage = rewritten.choice.storages[n.name]
    cut = "whole on every rank" if storage.map is None else f"cut along dim {storage.map.dim}"
    out = [f"parameter {n.name}: {cut}"]
    program = rewritten.analysis.program
    readers = [u for u in program.nodes if Ref(n.name) in u.refs()]
    regions = [f.kwargs["fold"] for f in rewritten.folds if n.name in f.kwargs["fold"].weights]
    out += [f"by region {f.name}, over {f.factor.origin or 'its pieces'}" for f in regions]
    if not regions and storage.map is not None:
        whole = any(u.name in rewritten.choice.lookups for u in readers)
        out.append("its rows are looked up where they lie" if whole else "gathered at use")
        out += [f"not folded: {why}" for g, why in rewritten.choice.refused if n.name in g.weights]
    return [*out, *(f"read by %{u.name} = {_op(u)} {u.source}" for u in readers)]


def _value(rewritten: Unit, n: Node) -> list[str]:
    typed = rewritten.typed
    dims = typed.dims.get((n.name, 0), ())
    text = ", ".join(typed.factors.show(d) or "1" for d in dims)
    place = PLACED[typed.places.get((n.name, 0), "R")]
    out = [f"%{n.name} = {_op(n)} [{text}] {n.source}: {place}"]
    record = typed.records.get(n.name)
    roles = [record.roles.get(leaf, ()) for leaf in typed.leaves] if record is not None else []
    out += [f"meets the sequence: {r}" for r in sorted({role for m in roles for role, *_ in m})]
    out += [f"runs replicated: {f.why}" for f in typed.fallbacks if f.node == n.name]
    nodes = {m.name: m for m in typed.program.nodes}
    for r in dict.fromkeys(n.refs()):
        source = nodes[r.name]
        how = "converted: " if source.op in CONVERSIONS else ""
        kind = "a fold's" if source.op == FOLD else _op(source)
        place = PLACED[typed.places.get((r.name, r.item or 0), "R")]
        out.append(f"reads {r!r}, {how}{kind}: {place}")
    users = [m for m in typed.program.nodes if n.name in {r.name for r in m.refs()}]
    return [*out, *(f"read by %{m.name} = {_op(m)} {m.source}" for m in users)]
