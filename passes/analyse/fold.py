"""Outline every chosen region: its ops become the body of one `fold` node, y = sum_j body(tokens,
W_j).

In: the analysed program and the regions to fold. Out: a program in which a `fold` node stands for
each region; its results are the region's exits. A bias that is added after the sum moves out of the
body (docs/design.md, "Regions and folds").
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tspc.factors.factor import Dim, Factor
from tspc.factors.registry import ONCE
from tspc.ir.program import APART, CASTS, FOLD, OUTPUT, PARAM, Node, Program, Ref, Type
from tspc.ir.text import textual
from tspc.passes.analyse.factorize import Analysis, Record
from tspc.passes.analyse.independent import independent, is_independent, makers_in, makers_of
from tspc.passes.analyse.regions import Region

aten = torch.ops.aten
SUM, LSE, STACK = "sum", "lse", "stack"


def _of_the_analysis(**default: Any) -> Any:
    """A field that is no part of the text, and so not compared."""
    return field(compare=False, repr=False, kw_only=True, **default)


@textual
@dataclass(frozen=True)
class Exit:
    """A value that leaves a region: summed over j, merged by log-sum-exp, or stacked over j."""

    ref: Ref
    kind: str
    type: Type
    dims: tuple[tuple[Factor, ...], ...] = _of_the_analysis(default=())


@textual
@dataclass(frozen=True)
class Fold:
    """What a fold node runs.

    `units` pieces of the factor are in each of the D shards, pads included. dims: of each operand,
    as the body reads it.
    """

    name: str
    size: int
    units: int
    tokens: tuple[Ref, ...]  # carry the sequence; those with the factor are read at shard j's
    invariants: tuple[Ref, ...]  # carry neither the sequence nor the factor
    sliced: tuple[Ref, ...]  # whole on every rank, read at the rows of shard j
    weights: tuple[str, ...]
    exits: tuple[Exit, ...]
    schedule: str = "auto"
    recompute: int = 0  # all of it is of this checkpointed part
    casts: dict[str, torch.dtype] = field(default_factory=dict)  # of weights, before they travel
    apart: tuple[Exit, ...] = ()  # what is read outside and that the factor does not touch
    body: tuple[Node, ...] = ()
    factor: Factor = _of_the_analysis(default=None)
    records: dict[str, Record] = _of_the_analysis(default_factory=dict)
    dims: dict[Ref, tuple[tuple[Factor, ...], ...]] = _of_the_analysis(default_factory=dict)


def outline(
    analysis: Analysis,
    regions: Sequence[tuple[str, Region, str]],
    leaves: frozenset[Factor],
    ranks: int,
    differentiable_outputs: bool = True,
) -> Program:
    """Replace the ops of each region by one fold node.

    regions: (name, region, schedule). leaves: the factors of the sequences.
    differentiable_outputs: gradients flow back from the program's outputs that a region makes.
    """
    readers = _readers(analysis, [region for _, region, _ in regions])
    outputs = set(analysis.program.output.refs()) if differentiable_outputs else set()
    folds = [
        _fold(analysis, name, region, schedule, leaves, ranks, outside | outputs)
        for (name, region, schedule), outside in zip(regions, readers)
    ]
    inside = {name for f in folds for name in f.records}
    moved: dict[Ref, Ref] = {}
    new_nodes: list[Node] = []
    for k, fold in enumerate(folds):
        node_name = f"fold_{k}"
        params = tuple(Ref(w) for w in fold.weights)
        types: list[Type | None] = []
        extra: list[Node] = []
        for i, e in enumerate(fold.exits):
            types.append(e.type)
            moved[e.ref] = Ref(node_name, i)
            bias = added_once(analysis.program.node(e.ref.name)) if e.kind == SUM else None
            if bias is not None:
                added = Node(
                    f"{e.ref.name}_bias",
                    aten.add.Tensor,
                    (Ref(node_name, i), bias),
                    types=(e.type,),
                    source=analysis.program.node(e.ref.name).source,
                    recompute=fold.recompute,
                )
                extra.append(added)
                moved[e.ref] = Ref(added.name)
        if fold.apart:
            new_nodes.append(_apart(analysis, node_name, fold, leaves, ranks))
            moved |= {e.ref: Ref(new_nodes[-1].name, i) for i, e in enumerate(fold.apart)}
        operands = (fold.tokens, fold.invariants, fold.sliced, params)
        source = fold.body[0].source
        kwargs = {"fold": fold}
        new_nodes.append(
            Node(node_name, FOLD, operands, kwargs, tuple(types), source, fold.recompute)
        )
        new_nodes += extra
    kept = [n for n in analysis.program.nodes if n.name not in inside]

    def rename(r: Ref) -> Ref:
        plain = Ref(r.name) if r.item == 0 else r
        return moved.get(r, moved.get(plain, r))

    nodes = [n.map_refs(rename) for n in kept + new_nodes]
    return replace(analysis.program, nodes=_sorted(nodes)).without_dead_nodes()


def _apart(a: Analysis, name: str, fold: Fold, leaves: frozenset[Factor], ranks: int) -> Node:
    """The node that makes what the factor does not touch, of one shard."""
    ops = {r.index for e in fold.apart for r in makers_of(e.ref, fold.records, fold.factor)}
    alone = _fold(a, fold.name, Region(fold.factor, [], ops), "", leaves, ranks, None)
    alone = replace(alone, exits=fold.apart)
    operands = (alone.tokens, alone.invariants, alone.sliced, tuple(map(Ref, alone.weights)))
    types = tuple(e.type for e in alone.exits)
    source = alone.body[0].source
    return Node(f"{name}.apart", APART, operands, {"fold": alone}, types, source, alone.recompute)


def _readers(a: Analysis, regions: Sequence[Region]) -> list[set[Ref]]:
    """Of each region: what others read, but for what they make themselves too."""
    index_of = {r.node.name: r.index for r in a.records}
    holders: dict[int, list[int]] = {}
    for k, g in enumerate(regions):
        for i in g.ops:
            holders.setdefault(i, []).append(k)
    out: list[set[Ref]] = [set() for _ in regions]
    for x in a.records:
        if x.node.op == OUTPUT:
            continue
        inside = holders.get(x.index, [])
        for ref in x.node.refs():
            makers = holders.get(index_of.get(ref.name, -1), [])
            if makers and not all(k in makers for k in inside or [-1]):
                for k in makers:
                    out[k].add(ref)
    return out


def _fold(
    a: Analysis,
    name: str,
    region: Region,
    schedule: str,
    leaves: frozenset[Factor],
    ranks: int,
    outside: set[Ref] | None,
) -> Fold:
    """outside: values that are read outside of the regions and differentiated there; None: all of
    it is made apart."""
    f = region.factor
    records = {a.records[i].node.name: a.records[i] for i in sorted(region.ops)}
    makers = makers_in(a, region)
    alone = {
        Ref(name, item if len(r.node.types) > 1 else None)
        for name, r in records.items()
        for item in independent(r, f)
        if outside is not None and is_independent(Ref(name, item), makers, region)
    }
    left = {x.name for x in alone if x.item is None}  # no part of the body
    body = []
    for r in (r for name, r in records.items() if name not in left):
        summed = any(role == "reduce" for role, *_ in r.roles.get(f, ()))
        body.append(summand(r.node) if summed else r.node)
    inside = set(records) - left
    read = _operands(a, f, body, records, inside, alone, leaves)
    exits, apart = _exits(a, f, records, alone, outside or set())
    size = int(f.size)
    body, casts = _cast_before(body, set(read.weights))
    return Fold(
        name,
        size,
        -(-size // ranks),
        tuple(read.tokens),
        tuple(read.invariants),
        tuple(read.sliced),
        tuple(read.weights),
        tuple(exits),
        schedule,
        _group(body),
        casts,
        tuple(apart),
        body=body,
        factor=f,
        records=records,
        dims=read.dims,
    )


@dataclass
class _Operands:
    """What a body reads, in order, and its dims."""

    dims: dict[Ref, tuple[Dim, ...]] = field(default_factory=dict)
    tokens: dict[Ref, None] = field(default_factory=dict)
    invariants: dict[Ref, None] = field(default_factory=dict)
    sliced: dict[Ref, None] = field(default_factory=dict)
    weights: dict[str, None] = field(default_factory=dict)


def _operands(
    a: Analysis,
    f: Factor,
    body: Sequence[Node],
    records: Mapping[str, Record],
    inside: Container[str],
    alone: Container[Ref],
    leaves: frozenset[Factor],
) -> _Operands:
    """inside: what the body makes. alone: what is made apart."""
    read, params = _Operands(), {n.name: n for n in a.program.nodes if n.op == PARAM}
    for node in body:
        r, used = records[node.name], set(node.refs())
        for ref, carried, dims in zip(r.refs, r.carried_in, r.ins):
            if ref is None or ref not in used or (ref.name in inside and ref not in alone):
                continue
            read.dims.setdefault(ref, tuple(map(tuple, dims)))
            if f in carried and ref.name in params and len(params[ref.name].type.shape) > 1:
                read.weights[ref.name] = None
            elif carried & leaves:
                read.tokens[ref] = None
            elif f in carried:
                read.sliced[ref] = None
            else:
                read.invariants[ref] = None
    return read


def _exits(
    a: Analysis,
    f: Factor,
    records: Mapping[str, Record],
    alone: Container[Ref],
    outside: Container[Ref],
) -> tuple[list[Exit], list[Exit]]:
    """What leaves the body, and what is made apart."""
    exits: list[Exit] = []
    apart: list[Exit] = []
    outputs = set(a.program.output.refs())
    for r in records.values():
        roles = {role for role, *_ in r.roles.get(f, ())}
        for item, (dims, t) in enumerate(zip(r.outs, r.node.types)):
            if t is None:
                continue
            ref = Ref(r.node.name, item if len(r.node.types) > 1 else None)
            shape = tuple(tuple(d) for d in dims)
            if roles & {"reduce"}:
                exits.append(Exit(ref, SUM, t, dims=shape))
            elif "lse" in roles:
                exits.append(Exit(ref, LSE, t, dims=shape))
            elif ref in alone:
                apart.append(Exit(ref, APART, t, dims=shape))
            elif ref in outputs or ref in outside:
                grad = t.requires_grad and ref in outside
                exits.append(Exit(ref, STACK, replace(t, requires_grad=grad), dims=shape))
    return exits, apart


def _group(body: Sequence[Node]) -> int:
    groups = {n.recompute for n in body}
    return groups.pop() if len(groups) == 1 else 0


def _cast_before(
    body: list[Node], weights: set[str]
) -> tuple[tuple[Node, ...], dict[str, torch.dtype]]:
    """Those weights of which the body reads only one cast are cast before they travel."""
    read: dict[str, set[torch.dtype | None]] = {}
    casts_of: dict[Ref, Ref] = {}
    for n in body:
        for r in n.refs():
            if r.name in weights:
                cast = n.type.dtype if n.op in CASTS else None
                read.setdefault(r.name, set()).add(cast)
    casts = {w: d for w, ds in read.items() if len(ds) == 1 and (d := next(iter(ds))) is not None}
    kept = []
    for n in body:
        if n.op in CASTS and n.args[0].name in casts:
            casts_of[Ref(n.name)] = n.args[0]
        else:
            kept.append(n.map_refs(lambda r: casts_of.get(r, r)))
    return tuple(kept), casts


def added_once(node: Node) -> Ref | None:
    """The operand that is added after the sum."""
    i = ONCE.get(node.op, len(node.args))
    return node.args[i] if i < len(node.args) else None


def summand(node: Node) -> Node:
    """The node without what is added after the sum."""
    if added_once(node) is None:
        return node
    if node.op == aten.linear.default:
        return replace(node, args=node.args[:2])
    plain = aten.mm.default if node.op == aten.addmm.default else aten.bmm.default
    return replace(node, op=plain, args=node.args[1:3], kwargs={})


def _sorted(nodes: list[Node]) -> tuple[Node, ...]:
    """Topological order that keeps the given order where it can; placeholders first, the output
    last."""
    by_name = {n.name: n for n in nodes}
    done: set[str] = set()
    out: list[Node] = []
    for first in nodes:
        stack = [first]
        while stack:
            n = stack[-1]
            if n.name in done:
                stack.pop()
                continue
            missing = [by_name[r.name] for r in n.refs() if r.name not in done]
            if missing:
                assert len(stack) <= len(nodes), f"{n.name} needs itself"
                stack += missing[:1]
                continue
            done.add(n.name)
            out.append(n)
            stack.pop()
    placeholders = [n for n in out if n.op in (PARAM, "buffer", "input")]
    calls = [n for n in out if n.op not in (PARAM, "buffer", "input", OUTPUT)]
    return (*placeholders, *calls, by_name[OUTPUT])
