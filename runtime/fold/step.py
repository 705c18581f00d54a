"""One call of a fold on one rank, and the backward of one of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Protocol

import sympy
import torch

from tspc.ir.body import Attention, Body, Lengths, Piece, Token, evaluate, symbol_values
from tspc.ir.layout import Layout, Span
from tspc.ir.program import Size
from tspc.ops.attention import sinks_gradient, sunk
from tspc.runtime.attention import kernels as attn
from tspc.runtime.comm.exchange import take
from tspc.runtime.comm.requests import Axis, Steps

Tensor = torch.Tensor
Values = dict[str, Tensor]


class Pieces(Protocol):
    """Runs the pieces of a body, eagerly or compiled."""

    def forward(self, index: int, symbols: Lengths, step: Tensor, values: Values) -> Values: ...

    def again(self, index: int, symbols: Lengths, step: Tensor, values: Values) -> Values: ...

    def backward(
        self, index: int, symbols: Lengths, step: Tensor, values: Values, cotangents: Values
    ) -> Values: ...


@dataclass
class Call:
    """One call of a fold on one rank."""

    axis: Axis
    body: Body
    pieces: Pieces
    schedule: str
    tokens: Sequence[Tensor]
    invariants: Sequence[Tensor]
    shards: Sequence[Tensor]
    sizes: Sequence[int]
    rows: Sequence[int]  # c of each sequence of the body
    lengths: Sequence[int]
    turn: int = 0  # the step that it is at, from 1
    by_parts: dict[int, dict[sympy.Symbol, int]] = field(default_factory=dict)  # symbols by parts

    @cached_property
    def layouts(self) -> list[Layout]:
        return [e.layout(self.axis.size) for e in self.body.extents]

    def symbols(self, parts: int = 1) -> dict[sympy.Symbol, int]:
        """Sizes of a step on the rows of so many ranks."""
        if parts not in self.by_parts:
            rows = [parts * l.chunks * c for l, c in zip(self.layouts, self.rows)]
            self.by_parts[parts] = symbol_values(self.body, self.sizes, rows)
        return self.by_parts[parts]

    def lead(self, size: Size) -> int:
        return evaluate(size, self.symbols())

    def span(self, i: int) -> Span:
        """Of a sequence."""
        return Span(self.layouts[i], self.rows[i], self.lengths[i])

    def meeting(self, a: Attention) -> attn.Meeting:
        spec, sizes = a.spec, a.spec.sizes
        if sizes:
            spec = replace(spec, sizes=tuple(map(self.lead, sizes)))
        return attn.Meeting(spec, self.span(a.queries), self.span(a.keys))

    def biased(self, a: Attention) -> bool:
        """The mask is added and wants a gradient."""
        mask = a.operands.mask
        return mask is not None and self.body.values[mask].requires_grad

    def rows_of(self, spec: Token, t: Tensor, lead: int, rank: int) -> Tensor:
        """The rows of a rank of a token that is given whole."""
        return take(self.span(spec.sequence), rank, t, spec.dim, lead)

    def step(self, j: int) -> Tensor:
        return torch.full((), j, device=self.shards[0].device)

    def local_tokens(self) -> Values:
        """This rank's rows of every token."""
        out: Values = {}
        for spec, t in zip(self.body.tokens, self.tokens):
            if spec.whole:
                t = self.rows_of(spec, t, self.lead(spec.lead), self.axis.rank)
            out[spec.name] = t
        return out

    @property
    def sent(self) -> torch.dtype:
        """The type in which shards travel: what the body computes in."""
        return reduce(torch.promote_types, (self.body.values[n].dtype for n in self.body.shards))

    def buffer(self) -> Tensor:
        """Room for one shard of all weights."""
        length = sum(s.numel() for s in self.shards)
        return self.shards[0].new_empty(length, dtype=self.sent)

    def flat(self) -> Tensor:
        """This rank's shards in one buffer."""
        out = self.buffer()
        for p, s in zip(out.split([s.numel() for s in self.shards]), self.shards):
            p.copy_(s.reshape(-1))
        return out

    def own(self) -> Values:
        """This rank's shards."""
        return {n: s.to(self.body.values[n].dtype) for n, s in zip(self.body.shards, self.shards)}

    def unpack(self, flat: Tensor) -> Values:
        parts = flat.split([s.numel() for s in self.shards])
        return {
            n: p.view(s.shape).to(self.body.values[n].dtype)
            for n, p, s in zip(self.body.shards, parts, self.shards)
        }

    def invariant_values(self) -> Values:
        return dict(zip(self.body.invariants, self.invariants))

    def saved(self, values: Values) -> list[Tensor]:
        """What the backward takes, of the rows of all ranks: as D blocks of the local shape."""
        blocks = []
        for n in self.body.saves:
            shape = [self.axis.size, *self.shape(n)]
            blocks.append(values[n].reshape(shape))
        return blocks

    def restored(self, saved: Sequence[Tensor]) -> Values:
        """The inverse of `saved`."""
        return {n: t.view(self.shape(n, self.axis.size)) for n, t in zip(self.body.saves, saved)}

    def shape(self, name: str, parts: int = 1) -> list[int]:
        symbols = self.symbols(parts)
        return [evaluate(s, symbols) for s in self.body.values[name].shape]


class Sums(dict[str, Tensor]):
    """Values that add up, in fp32 or wider. The first of a name is taken as it is, not copied: what
    was given is never written to."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[str] = set()

    def add(self, name: str, x: Tensor) -> None:
        if name not in self:
            self[name] = x.to(torch.promote_types(x.dtype, torch.float32))
        elif name in self.made:
            self[name] += x
        else:
            self[name] = self[name] + x
            self.made.add(name)

    def take(self, name: str) -> Tensor | None:
        self.made.discard(name)
        return self.pop(name, None)


@dataclass
class Exchange:
    """How K and V meet the queries of a call, and their gradients go back: once per shard, or once
    per call where they carry nothing of the shard (one K/V head)."""

    call: Call
    once: dict[Attention, tuple[Tensor, Tensor]] = field(default_factory=dict)
    sums: dict[Attention, Sums] = field(default_factory=dict)

    def start(self, fixed: Values) -> Steps:
        """fixed: the values that are equal for all shards."""
        for a in self.call.body.attentions:
            if a.operands.k in fixed and a.operands.v in fixed:
                self.once[a] = yield from self._gather(a, fixed)

    def _gather(self, a: Attention, values: Values) -> Steps:
        call, x = self.call, a.operands
        keys = values[x.k], values[x.v]
        return (yield from attn.gather(call.axis.rank, call.meeting(a), *keys))

    def _whole(self, a: Attention, values: Values) -> Steps:
        """(the operands against which all its queries are met, the chunks of the queries)."""
        k, v = self.once.get(a) or (yield from self._gather(a, values))
        chunks = self.call.layouts[a.queries].chunk_ids(self.call.axis.rank)
        return replace(a.operands.map(values.__getitem__), k=k, v=v), chunks

    def forward(self, a: Attention, values: Values) -> Steps:
        """(out, lse) of one shard."""
        x, chunks = yield from self._whole(a, values)
        return attn.attend(x, self.call.meeting(a), chunks)

    def backward(self, a: Attention, g: Tensor, values: Values) -> Steps:
        """Gradients of what the attention of one shard reads, by name."""
        call, names, m = self.call, a.operands, self.call.meeting(a)
        x, chunks = yield from self._whole(a, values)
        done = values[a.out], values[a.lse]
        dq, dk, dv, *more = attn.attend_backward(g, x, done, m, chunks, call.biased(a))
        grads = {names.q: dq, **({names.mask: more[0]} if names.mask and more else {})}
        if a in self.once:
            sums = self.sums.setdefault(a, Sums())
            sums.add(names.k, dk)
            sums.add(names.v, dv)
            return grads
        dk, dv = yield from attn.scatter(call.axis.rank, m, dk, dv)
        return {**grads, names.k: dk, names.v: dv}

    def finish(self, total: Sums) -> Steps:
        """Gradients of what was exchanged once per call."""
        call = self.call
        for a, sums in self.sums.items():
            k, v = a.operands.k, a.operands.v
            dk, dv = yield from attn.scatter(call.axis.rank, call.meeting(a), sums[k], sums[v])
            total.add(k, dk)
            total.add(v, dv)


@dataclass
class Resident(Exchange):
    """The same where the rows of all ranks are here, in rank order (stationary)."""

    def start(self, fixed: Values) -> Steps:
        return
        yield

    def _ordered(self, x: Tensor, sequence: int, dim: int = 2) -> Tensor:
        return self.call.layouts[sequence].in_order(x, dim, self.call.rows[sequence])

    def _by_rank(self, x: Tensor, sequence: int, dim: int = 2) -> Tensor:
        return self.call.layouts[sequence].by_rank(x, dim, self.call.rows[sequence])

    def _whole(self, a: Attention, values: Values) -> Steps:
        """All in order, keys and values without pads."""
        x, q = a.operands.map(values.__getitem__), a.queries
        k, v = (self._ordered(y, a.keys)[:, :, : self.call.lengths[a.keys]] for y in (x.k, x.v))
        mask, states = x.mask, x.states
        if mask is not None and mask.shape[-2] != 1:
            mask = self._ordered(mask, q, mask.dim() - 2)
        states = self._ordered(states, q) if states is not None else None
        chunks = list(range(self.call.axis.size * self.call.layouts[q].chunks))
        return replace(x, q=self._ordered(x.q, q), k=k, v=v, mask=mask, states=states), chunks
        yield

    def forward(self, a: Attention, values: Values) -> Steps:
        out, lse = yield from super().forward(a, values)
        return self._by_rank(out, a.queries), self._by_rank(lse, a.queries)

    def backward(self, a: Attention, g: Tensor, values: Values) -> Steps:
        x, chunks = yield from self._whole(a, values)
        g, out, lse = (self._ordered(y, a.queries) for y in (g, values[a.out], values[a.lse]))
        call, names = self.call, a.operands
        m, biased = call.meeting(a), call.biased(a)
        grads = attn.attend_backward(g, x, (out, lse), m, chunks, biased)
        missing = values[names.k].shape[2] - call.lengths[a.keys]
        dk, dv = (torch.nn.functional.pad(d, (0, 0, 0, missing)) for d in grads[1:3])
        by_rank = (grads[0], a.queries), (dk, a.keys), (dv, a.keys)
        named = {n: self._by_rank(*y) for n, y in zip((names.q, names.k, names.v), by_rank)}
        if names.mask and len(grads) > 3:
            d = grads[3]
            rows = d.dim() - 2
            named[names.mask] = self._by_rank(d, a.queries, rows) if d.shape[rows] != 1 else d
        return named


def attended(exchange: Exchange, a: Attention, values: Values) -> Steps:
    """(out, lse) of one shard, its sinks in both: the backward takes them as they are."""
    out, lse = yield from exchange.forward(a, values)
    sinks = a.operands.sinks
    return (out, lse) if sinks is None else sunk(out, lse, values[sinks])


def step_backward(
    call: Call, symbols: Lengths, j: int, values: Values, cotangents: Values, exchange: Exchange
) -> Steps:
    """Gradients of all operands of one step; pieces before the last run again."""
    body, step = call.body, call.step(j)
    last = max(i for i, s in enumerate(body.steps) if isinstance(s, Piece))
    for index, s in enumerate(body.steps):
        if isinstance(s, Piece) and index < last:
            kept = {a.out for a in body.attentions}
            recomputed = call.pieces.again(index, symbols, step, values)
            values.update({n: t for n, t in recomputed.items() if n not in kept})
    grads = Sums()
    for n, g in cotangents.items():
        grads.add(n, g)
    for index in reversed(range(len(body.steps))):
        s = body.steps[index]
        if isinstance(s, Piece):
            outgoing = {n: g for n in s.writes if (g := grads.take(n)) is not None}
            if outgoing:
                for n, g in call.pieces.backward(index, symbols, step, values, outgoing).items():
                    grads.add(n, g)
            continue
        g = grads.take(s.out)
        out = values[s.out]
        g = torch.zeros_like(out) if g is None else g.to(out.dtype)
        for n, d in (yield from exchange.backward(s, g, values)).items():
            grads.add(n, d)
        if (sinks := s.operands.sinks) is not None:
            grads.add(sinks, sinks_gradient(g, out, values[s.lse], values[sinks]))
    return grads


def in_operand_order(call: Call, total: Values, shards: Values) -> tuple[list, list, list]:
    """In operand order, in the operands' dtypes."""
    body = call.body

    def of(names: Sequence[str], source: Values, like: Sequence[Tensor]) -> list[Tensor | None]:
        out: list[Tensor | None] = []
        for n, x in zip(names, like):
            if not body.values[n].requires_grad:
                out.append(None)
            elif n in source:
                out.append(source[n].to(x.dtype))
            else:
                out.append(torch.zeros_like(x))
        return out

    return (
        of([t.name for t in body.tokens], total, call.tokens),
        of(body.invariants, total, call.invariants),
        of(body.shards, shards, call.shards),
    )
