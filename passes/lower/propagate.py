"""Decide on which ranks each value lives and insert the conversions (docs/design.md,
"Types on the axis").

In: a program whose regions are folds, with its analysis. Out: `Typed`: the same program with
conversion nodes, the dims of every value as factors, and its placement: "R" (equal on all ranks)
or "S" (cut along the sequence). A partial sum is all-reduced where it arises; a replicated value
that meets a sequence-sharded one is used through a "vary" or a "local".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from tspc.factors.factor import Dims, Factor
from tspc.ir.kinds import (
    ALL_REDUCE,
    CLEAR,
    CONTRACTIONS,
    EMBED,
    GATHER_WEIGHT,
    LOCAL,
    MEANS,
    SUMS,
    VARY,
    WHOLE,
)
from tspc.ir.program import (
    APART,
    FOLD,
    OUTPUT,
    PARAM,
    PLACEHOLDERS,
    SDPA,
    Node,
    Program,
    Ref,
    Type,
    casts_of_parameters,
)
from tspc.ops.attention import ATTENTION, bound
from tspc.ops.lookup import IN_RANGE
from tspc.passes.analyse.factorize import REFUSED, Analysis, Record, in_segment
from tspc.passes.analyse.fold import Fold, added_once, summand
from tspc.passes.analyse.sequence import attends, masks_by_key
from tspc.passes.analyse.typed import Fallback, Typed, sequence_of
from tspc.passes.lower.mask_rows import Cutter
from tspc.passes.lower.sequence_ops import runs

aten = torch.ops.aten


@dataclass
class _State:
    analysis: Analysis
    leaves: tuple[Factor, ...]
    cut_weights: dict[str, int]
    lookups: frozenset[str]
    nodes: list[Node] = field(default_factory=list)
    dims: dict[tuple[str, int], Dims] = field(default_factory=dict)
    places: dict[tuple[str, int], str] = field(default_factory=dict)
    types: dict[tuple[str, int], Type] = field(default_factory=dict)
    converted: dict[tuple[Ref, str], Ref] = field(default_factory=dict)
    params: set[str] = field(default_factory=set)
    fallbacks: list[Fallback] = field(default_factory=list)
    records: dict[str, Record] = field(default_factory=dict)
    by_name: dict[str, Node] = field(default_factory=dict)
    casts: dict[str, str] = field(default_factory=dict)  # of parameters
    cutters: dict[Factor, Cutter] = field(default_factory=dict)

    def carries(self, dims: Dims) -> bool:
        return self.leaf_of(dims) is not None

    def leaf_of(self, dims: Dims) -> Factor | None:
        """The sequence that the dims have."""
        i = sequence_of(self.analysis.F, self.leaves, dims)
        return None if i is None else self.leaves[i]

    def place(self, ref: Ref) -> str:
        return self.places[ref.name, ref.item or 0]

    def emit(self, node: Node, dims: Sequence[Dims], place: str) -> Ref:
        self.nodes.append(node)
        self.by_name[node.name] = node
        for item, (d, t) in enumerate(zip(dims, node.types)):
            if t is not None:
                self.dims[node.name, item] = d
                self.places[node.name, item] = place
                self.types[node.name, item] = t
        return Ref(node.name)

    def convert(
        self, ref: Ref, kind: str, place: str, source: str, dims: Dims | None = None
    ) -> Ref:
        """One conversion per value and kind.

        dims: as the user of the value reads them.
        """
        key = (ref, kind)
        if key not in self.converted:
            t = self.types[ref.name, ref.item or 0]
            dims = self.dims[ref.name, ref.item or 0] if dims is None else dims
            base = f"{ref.name}.{ref.item}" if ref.item else ref.name
            cut = {"dim": self.cut_weights[ref.name]} if ref.name in self.cut_weights else {}
            if cut:  # cast before it travels
                ref = Ref(self.casts.get(ref.name, ref.name))
            node = Node(f"{base}.{kind}", kind, (ref,), cut, (t,), source)
            self.converted[key] = self.emit(node, [dims], place)
        return self.converted[key]

    def sequence(self, ref: Ref, source: str, dims: Dims | None = None) -> Ref:
        """The value cut along the sequence."""
        if self.place(ref) == "S":
            return ref
        if ref.name in self.cut_weights:
            ref = self.replicated(ref, source)
        return self.convert(ref, LOCAL, "S", source, dims)

    def replicated(self, ref: Ref, source: str) -> Ref:
        """The value whole on every rank, its cotangent equal on all."""
        if ref.name in self.cut_weights:
            return self.convert(ref, GATHER_WEIGHT + "_r", "R", source)
        return self.convert(ref, WHOLE, "R", source) if self.place(ref) == "S" else ref

    def varying(self, ref: Ref, source: str) -> Ref:
        """A whole value whose cotangents differ by rank and add up."""
        if ref.name in self.cut_weights:
            return self.convert(ref, GATHER_WEIGHT, "V", source)
        t = self.types[ref.name, ref.item or 0]
        if not t.requires_grad:
            return ref
        if ref.name not in self.casts:
            return self.convert(ref, VARY, "V", source)
        key = (ref, VARY)  # the gradient adds up in the parameter's own type
        if key not in self.converted:
            whole = self.varying(Ref(self.casts[ref.name]), source)
            node = replace(self.by_name[ref.name], name=f"{ref.name}.{VARY}")
            node = node.map_refs(lambda _: whole)
            self.converted[key] = self.emit(node, [self.dims[ref.name, 0]], "V")
        return self.converted[key]


def propagate(
    program: Program,
    analysis: Analysis,
    leaves: tuple[Factor, ...],
    cut_weights: Mapping[str, int],
    lookups: frozenset[str],
) -> Typed:
    """cut_weights: parameters to gather at use, with the dim of their storage.

    lookups: nodes that look rows up in a cut table.
    """
    records = {r.node.name: r for r in analysis.records}
    s = _State(analysis, leaves, dict(cut_weights), lookups, records=records)
    casts = casts_of_parameters(program.nodes)
    for n in program.nodes:
        if n.op in PLACEHOLDERS:
            dims = tuple(map(tuple, analysis.env[n.name, 0])) if (n.name, 0) in analysis.env else ()
            s.emit(n, [dims or _plain(analysis, n.type)], "R")
            if n.op == PARAM:
                s.params.add(n.name)
        elif n.op == OUTPUT:  # a parameter leaves whole
            s.nodes.append(n.map_refs(lambda r: s.replicated(r, "") if _is_param(s, r) else r))
        elif n.op in (FOLD, APART):
            _fold(s, n)
        elif n.name in casts:
            s.casts[n.name] = base = casts[n.name]
            s.params.add(n.name)
            s.emit(n, [_dims_of(analysis, n.name, 0, n.type)], "R")
            if base in s.cut_weights:
                s.cut_weights[n.name] = s.cut_weights[base]
        elif n.name in analysis.program.replicated:
            result_dims = [_dims_of(analysis, n.name, i, t) for i, t in enumerate(n.types)]
            s.emit(n, result_dims, "R")
        else:
            _call(s, n, records.get(n.name))
    return Typed(
        replace(program, nodes=tuple(s.nodes)).without_dead_nodes(),
        analysis.F,
        s.dims,
        s.places,
        records,
        leaves,
        tuple(s.fallbacks),
    )


def _plain(a: Analysis, t: Type) -> Dims:
    return tuple(a.F.dim(size) for size in t.shape)


def _dims_of(a: Analysis, name: str, item: int, t: Type | None) -> Dims:
    if t is None:
        return ()
    if (name, item) in a.env:
        return tuple(map(tuple, a.env[name, item]))
    return _plain(a, t)


def _fold(s: _State, n: Node) -> None:
    fold: Fold = n.kwargs["fold"]
    masks = {m for x in fold.body if (m := mask_of(x)) is not None}
    tokens = tuple(
        cut_mask(s, new, fold.dims[old], n.source)
        if old in masks
        else new
        if _weak(s, new) and n.op == FOLD and not _is_map(s, new, fold.dims[old])
        else _rows(s, new, fold.dims[old], n.source)
        if _weak(s, new) and n.op == FOLD
        else s.sequence(new, n.source, fold.dims[old])
        for old, new in zip(fold.tokens, n.args[0])
    )
    invariants = tuple(s.varying(s.replicated(r, n.source), n.source) for r in n.args[1])
    sliced = tuple(s.varying(s.replicated(r, n.source), n.source) for r in n.args[2])
    node = replace(n, args=(tokens, invariants, sliced, n.args[3]))
    s.nodes.append(node)
    for item, e in enumerate(fold.exits):
        s.dims[n.name, item] = e.dims
        s.places[n.name, item] = "S"
        s.types[n.name, item] = e.type


def _is_map(s: _State, ref: Ref, dims: Dims) -> bool:
    """It has one element for each pair of tokens: no rank should hold it whole."""
    leaf = s.leaf_of(dims)
    others = [s.analysis.F.size(d) for d in dims if d != (leaf,)]
    replicated = s.by_name[ref.name].is_call and ref.name in s.analysis.program.replicated
    return replicated and leaf is not None and any(f.size in others for f in s.leaves)


def _rows(s: _State, ref: Ref, dims: Dims, source: str) -> Ref:
    """The value cut along the sequence, what makes it too where it is a map."""
    if s.place(ref) == "R" and _is_map(s, ref, dims):
        return cut_mask(s, ref, dims, source)
    return s.sequence(ref, source, dims)


def _weak(s: _State, ref: Ref) -> bool:
    return s.place(ref) == "R" and not s.types[ref.name, ref.item or 0].requires_grad


def _call(s: _State, n: Node, record: Record | None) -> None:
    if record is None:  # made by a pass: pointwise on its first operand
        first = n.refs()[0]
        dims = s.dims[first.name, first.item or 0]
        operands: dict[Ref, Dims] = {r: s.dims[r.name, r.item or 0] for r in n.refs()}
        outs, roles = [dims], []
    else:
        outs = [tuple(map(tuple, o)) for o in record.outs]
        read = {r: tuple(map(tuple, d)) for r, d in zip(record.refs, record.ins) if r}
        operands = {new: read.get(old, ()) for old, new in zip(record.node.refs(), n.refs())}
        roles = [x for leaf in s.leaves for x in record.roles.get(leaf, ())]
    leaves = {leaf for d in (*operands.values(), *outs) if (leaf := s.leaf_of(d)) is not None}
    kinds = {role for role, *_ in roles}
    cut = [r for r, d in operands.items() if s.carries(d)]
    touched = bool(cut) or any(map(s.carries, outs))
    whole = n.name in s.analysis.refused
    if whole or n.name in s.analysis.sealed:
        _fall_back(s, n, outs, REFUSED if whole else "it lays the sequence together")
        return
    attention = n.op == ATTENTION and kinds - {"at"} == {"exchange"}
    if not touched or not any(s.place(r) == "S" or _is_param(s, r) for r in operands):
        _replicate(s, n, outs)
        return
    if any(
        in_segment(s.analysis.F, d, leaf) for d in (*operands.values(), *outs) for leaf in leaves
    ):
        _fall_back(s, n, outs, "the sequence is part of a dim")
    elif n.name in s.lookups:
        _lookup(s, n, outs)
    elif n.op == aten.embedding.default and n.args[3:] == (True,):
        _fall_back(s, n, outs, "its gradient counts all tokens")
    elif kinds and all(_is_param(s, r) for r in operands):  # a range of a table: none is gathered
        _replicate(s, n, outs)
    elif attention and record is not None and attends(s.analysis, record, s.leaves):
        _attention(s, n, record, outs, operands)
    elif len(leaves) > 1:
        _fall_back(s, n, outs, "it meets two sequences")
    elif not kinds or runs(s.analysis.F, record, leaves):
        _in_step(s, n, outs, operands)
    elif kinds == {"reduce"} and (n.op in SUMS or n.op in MEANS or n.op in CONTRACTIONS):
        _reduce(s, n, outs, operands, cut)
    else:
        _fall_back(s, n, outs, ", ".join(sorted(kinds)))


def _in_step(s: _State, n: Node, outs: Sequence[Dims], operands: Mapping[Ref, Dims]) -> None:
    """Each rank runs the op on its rows."""
    renamed = {
        r: _rows(s, r, d, n.source)
        if s.carries(d)
        else s.varying(s.replicated(r, n.source), n.source)
        for r, d in operands.items()
    }
    if n.op == IN_RANGE:  # pads hold anything
        renamed = {r: s.convert(x, CLEAR, "S", n.source) for r, x in renamed.items()}
    s.emit(n.map_refs(lambda r: renamed[r]), outs, "S")


def _is_param(s: _State, ref: Ref) -> bool:
    return ref.name in s.params


def _fall_back(s: _State, n: Node, outs: Sequence[Dims], why: str) -> None:
    op = SDPA if n.op == ATTENTION else n.op  # as the model has it
    s.fallbacks.append(Fallback(n.name, str(op), why, n.type.shape, n.source))
    _replicate(s, n, outs)


def _replicate(s: _State, n: Node, outs: Sequence[Dims]) -> None:
    renamed = {r: s.replicated(r, n.source) for r in n.refs()}
    s.emit(n.map_refs(lambda r: renamed[r]), outs, "R")


def _lookup(s: _State, n: Node, outs: Sequence[Dims]) -> None:
    name: str = n.args[0].name
    table = Ref(s.casts.get(name, name))
    ids = s.replicated(n.args[1], n.source)
    padding, scaled = (*n.args[2:], *(-1, False)[len(n.args) - 2 :])
    flags = {"padding": padding, "scaled": scaled}
    node = Node(n.name, EMBED, (table, ids), flags, n.types, n.source, n.recompute)
    s.emit(node, outs, "S")


def _attention(
    s: _State, n: Node, record: Record, outs: Sequence[Dims], operands: dict[Ref, Dims]
) -> None:
    x, _ = bound(n)
    if x.sinks is not None:
        _fall_back(s, n, outs, "its sinks are in no fold")
        return
    if not all(s.carries(operands[r]) for r in (x.q, x.k, x.v)):
        _fall_back(s, n, outs, "its queries are of another sequence")
        return
    renamed = {r: s.sequence(r, n.source) for r in (x.q, x.k, x.v)}
    if (mask := x.mask) is not None:
        if s.carries(operands[mask]) and not masks_by_key(s.analysis, record, s.leaves):
            renamed[mask] = cut_mask(s, mask, operands[mask], n.source)
        else:
            renamed[mask] = s.varying(s.replicated(mask, n.source), n.source)
    if x.data is not None:
        renamed[x.data] = s.replicated(x.data, n.source)
    if x.states is not None:
        renamed[x.states] = s.sequence(x.states, n.source, operands[x.states])
    s.emit(n.map_refs(lambda r: renamed[r]), outs, "S")


def mask_of(n: Node) -> Ref | None:
    """The mask operand of an attention."""
    return bound(n)[0].mask if n.op == ATTENTION else None


def cut_mask(s: _State, mask: Ref, dims: Dims, source: str) -> Ref:
    """The rows of this rank's queries; one row for all queries stays whole."""
    at = [k for k, d in enumerate(dims) if s.carries((d,))]
    leaf = s.leaf_of(dims)
    if leaf is None or s.place(mask) == "S":
        return mask
    if mask.name not in s.analysis.program.replicated or dims[at[0]] != (leaf,):
        return s.sequence(mask, source, dims)
    if leaf not in s.cutters:

        def emit(node: Node, record: Record) -> Ref:
            s.records[node.name] = record
            return s.emit(node, [tuple(record.outs[0])], "S")

        def convert(ref: Ref, dims: Dims) -> Ref:
            return s.convert(ref, LOCAL, "S", s.by_name[ref.name].source, dims)

        s.cutters[leaf] = Cutter(s.analysis.F, leaf, s.by_name, convert, emit)
    return s.cutters[leaf].cut(mask, at[0])


def _reduce(
    s: _State, n: Node, outs: Sequence[Dims], operands: dict[Ref, Dims], cut: list[Ref]
) -> None:
    """A sum over the sequence: pads cleared on one operand, then the partial sums are all-
    reduced; what is added once is added after that."""
    renamed: dict[Ref, Ref] = {}
    bias, plain = added_once(n), summand(n)
    for r in plain.refs():
        if r in cut:
            renamed[r] = s.sequence(r, n.source, operands[r])
        else:
            renamed[r] = s.varying(s.replicated(r, n.source), n.source)
    first = renamed[cut[0]]
    renamed[cut[0]] = s.convert(first, CLEAR, "S", n.source)
    partial = replace(plain, name=f"{n.name}.partial").map_refs(lambda r: renamed[r])
    s.emit(partial, outs, "P")
    name = n.name if bias is None else f"{n.name}.sum"
    s.emit(Node(name, ALL_REDUCE, (Ref(partial.name),), types=n.types, source=n.source), outs, "R")
    if bias is not None:
        args = (Ref(name), s.replicated(bias, n.source))
        node = Node(n.name, aten.add.Tensor, args, {}, n.types, n.source, n.recompute)
        s.emit(node, outs, "R")
