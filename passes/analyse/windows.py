"""Compute on whole sequences what a model computes on a range of them, so that they stay cut.

In: the analysis, in which `x[:, lo:hi]` is a dim of its own. Out: a program in which the ops that
work row by row on it work on all rows instead; a sum over it leaves out the rows outside of the
range, and what needs the range itself gets it. One row of the sequence is a sum of which all other
rows are zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from tspc.base.context import Arguments
from tspc.factors.factor import Dims, Factor, const, norm
from tspc.ir.kinds import CONTRACTIONS, MEANS, SUMS
from tspc.ir.program import OUTPUT, PARAM, PLACEHOLDERS, Node, Program, Ref, Size, Type
from tspc.passes.analyse.factorize import Analysis, Record
from tspc.passes.analyse.sizes import Sizes
from tspc.seams.tensors import OpOverload

aten = torch.ops.aten
SHAPED = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.broadcast_to.default,
)
RESIZED = (aten.unflatten.int,)  # sizes among its arguments


@dataclass(frozen=True)
class Window:
    """Rows [lo, size - tail) of the sequence."""

    factor: Factor
    lo: int
    tail: int


def widen(a: Analysis, leaf: Factor | None) -> Program:
    """The program itself where nothing is a range of the sequence."""
    if leaf is None:
        return a.program
    return _Widen(a, leaf, _windows(a, leaf)).run()


def _windows(a: Analysis, leaf: Factor) -> list[Window]:
    """Ranges that leave out a fixed number of rows. Where unlike ones meet, those that start
    later are moved to the rows of the first."""
    windows: dict[Factor, set[tuple[Size, Size]]] = {}
    for r in a.records:
        if r.node.op != aten.slice.Tensor or not _is_trim(r, leaf):
            continue
        k, lo = _range(r)
        w, *others = a.F.expand(tuple(r.outs[0][k]))
        if others:  # cut further by a step
            continue
        n = a.F.size((leaf,))
        lo = norm(n + lo) if const(lo) and lo < 0 else lo
        windows.setdefault(w, set()).add((lo, norm(n - w.size - lo)))
    out = []
    for w, ranges in windows.items():
        few = {(m, n) for m, n in ranges if const(m) and const(n) and min(m, n) >= 0}
        if len(few) < len(ranges) or w.cat or w is leaf:
            continue
        lo, tail = min(few)
        if not (const(w.size) and w.size < lo + tail):
            out.append(Window(w, lo, tail))
    return out


def _is_trim(r: Record, leaf: Factor) -> bool:
    return any(role == "trim" for role, *_ in r.roles.get(leaf, ()))


def _range(r: Record) -> tuple[int, Size]:
    """(dim, start) of a slice."""
    args = (*r.node.args, *(None,) * 4)
    k = (args[1] if args[1] is not None else r.node.kwargs.get("dim", 0)) % len(r.ins[0])
    start = args[2] if args[2] is not None else r.node.kwargs.get("start")
    return k, start or 0


@dataclass
class _Widen:
    a: Analysis
    leaf: Factor
    windows: list[Window]
    nodes: list[Node] = field(default_factory=list)
    types: dict[str, tuple[Type | None, ...]] = field(default_factory=dict)
    wide: dict[Ref, Ref] = field(default_factory=dict)  # a value on a range -> on all rows
    of: dict[Ref, tuple[Window, Dims]] = field(default_factory=dict)  # its window and dims
    by_key: dict[object, Ref] = field(default_factory=dict)

    def run(self) -> Program:
        records = {r.node.name: r for r in self.a.records}
        for n in self.a.program.nodes:
            r = records.get(n.name) if n.op not in PLACEHOLDERS else None
            if r is None or n.op == OUTPUT:
                self.add(n.map_refs(self.narrow))
                continue
            window = self.window(r)
            if n.name in self.a.refused:
                self.add(n.map_refs(self.narrow))
            elif self.is_row(r):
                self.row(r)
            elif window is None or not self.widened(r, window):
                self.add(n.map_refs(self.narrow))
        return replace(self.a.program, nodes=tuple(self.nodes)).without_dead_nodes()

    def add(self, n: Node) -> Ref:
        self.nodes.append(n)
        self.types[n.name] = n.types
        return Ref(n.name)

    def type(self, r: Ref) -> Type:
        t = self.types[r.name][r.item or 0]
        assert t is not None
        return t

    def make(self, name: str, op: OpOverload, args: Arguments, t: Type, like: Node) -> Ref:
        taken = sum(n.name.startswith(name) for n in self.nodes)
        like = replace(like, name=f"{name}{taken}", op=op, args=args, kwargs={}, types=(t,))
        return self.add(like)

    # what is widened
    def window(self, r: Record) -> Window | None:
        """The one window whose rows the op reads or makes."""
        carried = set().union(*r.carried_in, *r.carried_out)
        hit = [w for w in self.windows if w.factor in carried]
        return hit[0] if len(hit) == 1 else None

    def widened(self, r: Record, w: Window) -> bool:
        n, f = r.node, w.factor
        if n.op == aten.slice.Tensor and _is_trim(r, self.leaf):
            source = self.moved(self.narrow(n.args[0]), r, w)
            self.wide[Ref(n.name)], self.of[Ref(n.name)] = source, (w, r.outs[0])
            return True
        roles = {role for role, *_ in r.roles.get(f, ())}
        sums = n.op in SUMS or n.op in MEANS or n.op in CONTRACTIONS
        plain = all(self.plain(d, f) for d in (*r.ins, *r.outs))
        if roles - ({"reduce"} if sums else set()) or not plain or n.op in RESIZED:
            return False
        read = {x: d for x, d, c in zip(r.refs, r.ins, r.carried_in) if x is not None and f in c}
        replicated = self.a.program.replicated
        if not any(x in self.wide for x in read) or any(
            x not in self.wide and x.name not in replicated for x in read
        ):
            return False
        operands = {x: self.wide.get(x) or self.extended(x, d, w, n) for x, d in read.items()}
        if roles:
            first = next(x for x in operands if x in self.wide)
            keep = (w.lo, w.tail)
            operands[first] = self.cleared(operands[first], read[first], f, keep, n)
        sizes = self.sizes(w)
        types = tuple(
            t and replace(t, shape=tuple(norm(sizes.dim(d)) for d in dims))
            for t, dims in zip(n.types, r.outs)
        )
        args = n.args
        if n.op in SHAPED:
            assert types[0] is not None
            args = (args[0], types[0].shape, *args[2:])
        new = replace(n, args=args, types=types, name=n.name if roles else f"{n.name}.wide")
        new = new.map_refs(lambda x: operands[x] if x in operands else self.narrow(x))
        if n.op in MEANS and roles:
            self.mean(new, r, sizes)
            return True
        self.add(new)
        for item, (dims, t) in enumerate(zip(r.outs, types)):
            if t is not None and any(f in self.a.F.leaves(tuple(d)) for d in dims):
                for old in (Ref(n.name, item), *([Ref(n.name)] if item == 0 else [])):
                    self.wide[old] = Ref(new.name, old.item)
                    self.of[old] = (w, dims)
        return True

    def moved(self, x: Ref, r: Record, w: Window) -> Ref:
        """The rows of a slice where the window has them."""
        k, lo = _range(r)
        lo = norm(self.leaf.size + lo) if lo < 0 else lo
        if lo == w.lo:
            return x
        by, t = norm(w.lo - lo), self.type(x)
        return self.make(f"{x.name}.moved", aten.roll.default, (x, (by,), (k,)), t, r.node)

    def plain(self, dims: Dims | None, f: Factor) -> bool:
        """The factor is in one dim at most, and no part of a segment."""
        F = self.a.F
        hits = [d for d in dims or () if f in F.leaves(tuple(d))]
        return len(hits) <= 1 and all(f in F.expand(tuple(d)) for d in hits)

    def sizes(self, w: Window | None) -> Sizes:
        return Sizes(self.a.F, {w.factor: self.leaf.size} if w else {})

    def mean(self, n: Node, r: Record, sizes: Sizes) -> None:
        """The sum over the rows of the window by their number."""
        rank = len(r.ins[0])
        over = n.args[1] if len(n.args) > 1 else None
        over = range(rank) if over in (None, ()) else [d % rank for d in _tuple(over)]
        count = norm(math.prod(self.a.F.size(tuple(r.ins[0][k])) for k in over))
        op = aten.sum.dim_IntList if n.op == aten.mean.dim else aten.sum.default
        total = self.add(replace(n, op=op, name=f"{n.name}.sum"))
        self.add(replace(n, op=aten.div.Scalar, args=(total, count), kwargs={}))

    # values on a range and on all rows
    def narrow(self, ref: Ref) -> Ref:
        """The rows of the window, for what does not work row by row."""
        if ref not in self.wide:
            return ref
        w, dims = self.of[ref]
        if ("narrow", ref) not in self.by_key:
            full = self.wide[ref]
            t = self.type(full)
            like = next(n for n in self.nodes if n.name == full.name)
            k, shape, flat = self.spread(dims, w.factor, t.shape, self.leaf.size)
            x = self.viewed(full, shape, t, like) if flat else full
            cut = (*shape[:k], w.factor.size, *shape[k + 1 :])
            end = norm(w.lo + w.factor.size)
            x = self.make(
                f"{full.name}.range",
                aten.slice.Tensor,
                (x, k, w.lo, end),
                replace(t, shape=cut),
                like,
            )
            if flat:
                original = next(n for n in self.a.program.nodes if n.name == ref.name)
                kept = original.types[ref.item or 0]
                assert kept is not None
                x = self.viewed(x, kept.shape, t, like)
            self.by_key["narrow", ref] = x
        return self.by_key["narrow", ref]

    def spread(
        self, dims: Dims, f: Factor, shape: Sequence[Size], size: Size
    ) -> tuple[int, tuple[Size, ...], bool]:
        """(dim, shape, whether it is another one): the factor as a dim of its own, of `size`."""
        F = self.a.F
        for k, d in enumerate(dims):
            leaves = F.expand(tuple(d))
            if f in leaves:
                at = leaves.index(f)
                parts = [F.size(leaves[:at]), size, F.size(leaves[at + 1 :])]
                if len(leaves) == 1:
                    return k, tuple(shape), False
                return k + 1, (*shape[:k], *parts, *shape[k + 1 :]), True
        raise AssertionError("no window in these dims")

    def viewed(self, x: Ref, shape: Sequence[Size], t: Type, like: Node) -> Ref:
        t = replace(t, shape=tuple(shape))
        return self.make(f"{x.name}.view", aten.reshape.default, (x, t.shape), t, like)

    def extended(self, ref: Ref, dims: Dims, w: Window, like: Node) -> Ref:
        """A replicated value of the range on all rows: its ends are repeated."""
        t = self.type(ref)
        shape = t.shape
        if ("extended", ref) in self.by_key:
            return self.by_key["extended", ref]
        k, spread, flat = self.spread(dims, w.factor, shape, w.factor.size)
        x = self.viewed(ref, spread, t, like) if flat else ref

        def end(start: Size, count: int) -> Ref:
            one, many = ((*spread[:k], m, *spread[k + 1 :]) for m in (1, count))
            stop = norm(start + 1)
            name = f"{ref.name}.end"
            row = self.make(
                name, aten.slice.Tensor, (x, k, start, stop), replace(t, shape=one), like
            )
            return self.make(name, aten.expand.default, (row, many), replace(t, shape=many), like)

        parts = [end(0, w.lo)] if w.lo else []
        parts += [x]
        parts += [end(norm(w.factor.size - 1), w.tail)] if w.tail else []
        full = (*spread[:k], self.leaf.size, *spread[k + 1 :])
        joined = self.make(
            f"{ref.name}.rows", aten.cat.default, (tuple(parts), k), replace(t, shape=full), like
        )
        if flat:
            sizes = self.sizes(w)
            joined = self.viewed(joined, tuple(norm(sizes.dim(d)) for d in dims), t, like)
        self.by_key["extended", ref] = joined
        return joined

    def cleared(self, x: Ref, dims: Dims, f: Factor, keep: tuple[Size, Size], like: Node) -> Ref:
        """Zero in the first and last rows."""
        t = self.type(x)
        k = next(i for i, d in enumerate(dims) if f in self.a.F.leaves(tuple(d)))
        at, spread, _ = self.spread(dims, f, t.shape, self.leaf.size)
        outside = self.outside(*keep, like)
        trail = (1,) * (len(spread) - at - 1)
        flag = self.type(outside)
        outside = self.viewed(outside, (self.leaf.size, *trail), flag, like)
        if len(spread) != len(t.shape):  # [lead, S, trail] of one dim
            three = spread[at - 1 : at + 2]
            last = len(t.shape) - k - 1
            outside = self.viewed(outside, (1, self.leaf.size, 1), flag, like)
            b = replace(flag, shape=three)
            outside = self.make("outside", aten.expand.default, (outside, three), b, like)
            outside = self.viewed(outside, (t.shape[k], *(1,) * last), flag, like)
        return self.make(f"{x.name}.inside", aten.masked_fill.Scalar, (x, outside, 0), t, like)

    def outside(self, lo: Size, tail: Size, like: Node) -> Ref:
        """Bool per row: among the first `lo` or the last `tail`."""
        if ("outside", lo, tail) not in self.by_key:
            holders = [n for n in self.nodes if n.op in PLACEHOLDERS]
            holder = next((n for n in holders if n.op != PARAM), holders[0])
            inner = norm(self.leaf.size - lo - tail)
            parts = []
            for size, value in ((lo, True), (inner, False), (tail, True)):
                if size == 0:
                    continue
                t = Type((size,), torch.bool)
                op = aten.new_ones.default if value else aten.new_zeros.default
                ref = self.make("outside", op, (Ref(holder.name), (size,)), t, like)
                self.nodes[-1] = replace(self.nodes[-1], kwargs={"dtype": torch.bool})
                parts.append(ref)
            t = Type((self.leaf.size,), torch.bool)
            joined = self.make("outside", aten.cat.default, (tuple(parts), 0), t, like)
            self.by_key["outside", lo, tail] = joined
        return self.by_key["outside", lo, tail]

    # one row
    def is_row(self, r: Record) -> bool:
        """The op takes one row, from the front or from the end, of a float value."""
        n = r.node
        if n.op not in (aten.select.int, aten.slice.Tensor) or not r.refs or r.refs[0] is None:
            return False
        k, at = _range(r)
        if self.a.F.expand(tuple(r.ins[0][k])) != (self.leaf,) or not n.type.is_float:
            return False
        one = n.op == aten.select.int or (n.type.shape[k] == 1 and not r.outs[0][k])
        return one and const(at)

    def row(self, r: Record) -> None:
        n = r.node
        k, at = _range(r)
        x = self.narrow(n.args[0])
        size = self.leaf.size
        ends = (at, norm(size - at - 1)) if at >= 0 else (norm(size + at), -at - 1)
        kept = self.outside(*ends, n)
        trail = (1,) * (len(r.ins[0]) - k - 1)
        flag = self.type(kept)
        kept = self.viewed(kept, (size, *trail), flag, n)
        t = self.type(x)
        only = self.make(f"{n.name}.only", aten.masked_fill.Scalar, (x, kept, 0), t, n)
        keepdim = n.op == aten.slice.Tensor
        self.add(replace(n, op=aten.sum.dim_IntList, args=(only, (k,), keepdim), kwargs={}))


def _tuple(x: int | Sequence[int]) -> tuple[int, ...]:
    return (x,) if isinstance(x, int) else tuple(x)
