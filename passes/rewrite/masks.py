"""Recognise the masks of attention as predicates over (b, q, k).

In: a normalized program. Out: the same with `causal=True`; for key padding a mask of one row
[B, 1, 1, S]; for all else that index arithmetic and data per position tell, the text of the
predicate and its data as rows [B, n, S]. What is added to the scores besides stays the mask, and
what is not recognised stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from tspc.ir.builder import Builder
from tspc.ir.program import CONSTANT, PLACEHOLDERS, SHAPE_ONLY, Node, Program, Ref, Type
from tspc.ir.spec import AttentionSpec, Operands
from tspc.masks.index import TRUE, At, Cases, clauses, index, is_predicate, substitute
from tspc.masks.predicate import B, H, K, Q, Unprintable, printed
from tspc.ops.attention import ATTENTION, bound, spelled
from tspc.passes.rewrite.mask_data import Rows
from tspc.passes.rewrite.normalize import all_dims
from tspc.rules.index import RULES, Reader

aten = torch.ops.aten
MAX_SIZE = 200  # nodes of an expression: beyond it the value is data
LOWEST = -1e9  # a fill so low that a softmax beside a score without it gives zero
ABSORBS = -1e30  # a fill so low that adding it to a score gives it, in any type
SUMS = (aten.add.Tensor,)
BOTH = (aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor)


def recognise_masks(program: Program, refused: Container[str] = ()) -> Program:
    """Masks that are known become flags and predicates; their nodes die."""
    if not any(n.op == ATTENTION for n in program.nodes):
        return program
    recogniser = _Recogniser({n.name: n for n in program.nodes})
    expressions(program.nodes, recogniser.env, recogniser.types, refused)
    for n in program.nodes:
        reads = n.op == ATTENTION and n.name not in refused
        recogniser.nodes.append(recogniser.rewritten(n) if reads else n)
        recogniser.seen.add(n.name)
    return replace(program, nodes=tuple(recogniser.nodes)).without_dead_nodes()


def expressions(
    nodes: Iterable[Node],
    env: dict[Ref, Any],
    types: dict[Ref, Type],
    refused: Container[str] = (),
) -> None:
    """Adds the index expression of every value without a parameter or float input behind it, and
    the types of all. refused: nodes that are data."""
    for n in nodes:
        for item, t in enumerate(n.types):
            if t is not None:
                types[Ref(n.name, item)] = t
                types.setdefault(Ref(n.name), t)
        if n.op in (*PLACEHOLDERS, CONSTANT):
            if not n.type.is_float:
                env[Ref(n.name)] = _data(n)
        elif (
            n.is_call
            and len(n.types) == 1
            and (n.op in SHAPE_ONLY or all(r in env for r in n.refs()))
        ):
            e = _expression(n, env, types) if n.name not in refused else _unread(n)
            if e is not None:
                env[Ref(n.name)] = e


def _expression(n: Node, env: dict[Ref, Any], types: dict[Ref, Type]) -> Any:
    fn = RULES.get(n.op._schema.name.split("::")[1])
    e = fn(Reader(n, env, types), *n.args, **n.kwargs) if fn is not None else None
    if e is None or (not isinstance(e, Cases) and e.count_ops() > MAX_SIZE):
        return _unread(n)
    return _ones(n, e)


def _unread(n: Node) -> Any:
    return None if n.type.is_float else _data(n)


def _data(n: Node) -> Any:
    """A reference to the value itself."""
    at = At(sympy.Symbol(n.name), *(index(d) for d in range(len(n.type.shape))))
    e = _ones(n, at)
    return sympy.Ne(e, 0, evaluate=False) if n.type.dtype == torch.bool else e


def _ones(n: Node, e: Any) -> Any:
    """Dims of size 1 have index 0."""
    gone = {index(d): sympy.Integer(0) for d, s in enumerate(n.type.shape) if s == 1}
    return substitute(e, gone)


@dataclass(frozen=True)
class Known:
    """A mask as a predicate over (b, h, q, k), and what it is where the predicate is false; 0: it
    is a bool."""

    predicate: Any
    fill: float = 0.0

    @property
    def is_safe(self) -> bool:
        """No row is without a key: each query has its own."""
        return substitute(self.predicate, {K: Q}) == TRUE


def as_known(e: Any, t: Type) -> Known | None:
    """None if it is not a predicate."""
    rank = len(t.shape)
    names = {index(rank - 1 - j): s for j, s in enumerate((K, Q, H, B)) if rank - 1 - j >= 0}
    if isinstance(e, Cases):
        values = dict(e.values)
        lowest = min(values)
        if any(map(math.isnan, values)) or not set(values) <= {0.0, lowest} or 0.0 not in values:
            return None
        mask = Known(substitute(values[0.0], names), lowest)
        return mask if lowest <= LOWEST or lowest == 0 else None
    return Known(substitute(e, names)) if is_predicate(e) else None


@dataclass
class _Parts:
    """A mask as a conjunction of predicates and what is left of it."""

    read: list[Known] = field(default_factory=list)
    unread: list[Ref] = field(default_factory=list)


@dataclass
class _Recogniser:
    """seen: the nodes before the one that is rewritten."""

    by_name: dict[str, Node]
    env: dict[Ref, Any] = field(default_factory=dict)
    types: dict[Ref, Type] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    rows: Rows = field(default_factory=Rows)

    def parts(self, mask: Ref) -> _Parts:
        """A sum of masks, or a conjunction, by what of it is known."""
        mask_read = as_known(self.env[mask], self.types[mask]) if mask in self.env else None
        if mask_read is not None and not _is_opaque(mask_read.predicate):
            return _Parts([mask_read])
        n = self.by_name[mask.name]
        if n.op in (*SUMS, *BOTH) and all(isinstance(a, Ref) for a in n.args) and not n.kwargs:
            both = [self.parts(a) for a in n.args]
            return _Parts(both[0].read + both[1].read, both[0].unread + both[1].unread)
        return _Parts([], [mask])

    def rewritten(self, n: Node) -> Node:
        """The attention with what is recognised of its mask."""
        x, a = bound(n)
        mask = x.mask
        if mask is None or a.predicate:
            return n
        parts = self.parts(mask)
        added = self.joined(parts.unread, n) if parts.read else mask
        if not parts.read or (parts.unread and added is None):
            return n
        both = Known(sympy.And(*(k.predicate for k in parts.read)))
        # beside a sink nothing of a fill is left
        fill = self.fill(parts, both, a.fill) if x.sinks is None else 0.0
        if fill is None:
            return n
        carried = self.carried(n, replace(x, mask=added), replace(a, fill=fill), both.predicate)
        return n if carried is None else spelled(n, *carried)

    def fill(self, parts: _Parts, both: Known, default: float) -> float | None:
        """What rows without a key show of a fill, as in `tspc.ir.spec`; default: that of the op,
        for nothing but -inf."""
        fills = {k.fill or -math.inf for k in parts.read}
        added = any(self.types[r].is_float for r in parts.unread)
        if both.is_safe and not added:
            return default if parts.unread else 0.0
        if fills == {-math.inf}:
            return default
        # of several finite ones the sum would show
        return fills.pop() if len(parts.read) == 1 else None

    def joined(self, added: Sequence[Ref], n: Node) -> Ref | None:
        """The one value that is left; None for none, or for several."""
        if len(added) != 1:
            return None
        b = Builder(self.by_name)
        b.at(n)
        mask = all_dims(b, added[0], n)
        self.nodes += b.nodes
        return mask

    def carried(
        self, n: Node, x: Operands[Ref], a: AttentionSpec, p: Any
    ) -> tuple[Operands[Ref], AttentionSpec] | None:
        """The attention under the predicate too; None where a clause is not one of data per
        position."""
        q, k = (self.types[r].shape for r in (x.q, x.k))
        causal = Q - K
        left = [c for c in clauses(p) if not _is(c, causal)]
        a = replace(a, causal=a.causal or len(left) < len(clauses(p)))
        padding = all(not c.free_symbols & {Q, H} and c.free_symbols & {K} for c in left)
        row = self.row(sympy.And(*left), k[-2]) if left and padding and x.mask is None else None
        if row is not None and not a.fill:
            return replace(x, mask=row), a
        if not left:
            return x, a
        carried = self.told(sympy.And(*left), n, q) if len(q) == 4 and q[-2] == k[-2] else None
        if carried is None:
            return None
        text, data, sizes = carried
        return replace(x, data=data), replace(a, predicate=text, sizes=sizes)

    def told(self, p: Any, n: Node, q: Sequence[Any]) -> tuple[str, Ref | None, Any] | None:
        """(text, data, sizes) of a predicate."""
        symbols: list[Any] = []

        def size(s: Any) -> str:
            if s in (B, H):
                raise Unprintable(str(s))
            if s not in symbols:
                symbols.append(s)
            return f"s{symbols.index(s)}"

        def element(at: Any) -> str:
            where = self.rows.place(at, self.by_name, q[-2])
            if where is None:
                raise Unprintable(str(at))
            return f"d{where}[{printed(self.rows.position(at), element, size)}]"

        self.rows.start()
        try:
            text = printed(p, element, size)
        except Unprintable:
            return None
        nodes, rows = self.rows.made(n, self.by_name, q[0], q[-2])
        self.nodes += nodes
        self.by_name.update((m.name, m) for m in nodes)
        self.types |= {Ref(m.name): m.type for m in nodes}
        return text, rows, tuple(symbols)

    def row(self, padding: Any, keys: Any) -> Ref | None:
        """A value of the program [B or 1, 1, 1, keys] that is the padding predicate."""
        for ref, e in self.env.items():
            t = self.types[ref]
            if t.dtype != torch.bool or len(t.shape) != 4 or ref.name not in self.seen:
                continue
            if t.shape[1:3] == (1, 1) and t.shape[3] == keys:
                mask = as_known(e, t)
                if mask is not None and mask.predicate == padding:
                    return ref
        return None


def _is(clause: Any, e: Any) -> bool:
    """The clause is e >= 0."""
    return isinstance(clause, sympy.Ge) and clause.lhs == e


def _is_opaque(p: Any) -> bool:
    """Of one reference to data over queries and keys."""
    return isinstance(p, sympy.Ne) and {Q, K} <= p.free_symbols and p.lhs.func == At
