"""The fold at run time: y = sum_j body(tokens, invariants, shard j) under each schedule, forward and backward.

Every schedule takes and returns the same tensors (DESIGN section 1): sums [local], stacks [D, local] by j, and saved
attention outputs with their log-sum-exp [D, local]. Sums over j are in fp32 or wider and are cast once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tspc.body import Attention, Body, Piece, evaluate, numel, symbol_values
from tspc.layout import Layout
from tspc.runtime import attention as attn
from tspc.runtime.exchange import join, part, take
from tspc.runtime.requests import (
    AllGather,
    AllToAll,
    Axis,
    Broadcast,
    Handle,
    Reduce,
    ReduceScatter,
    Shift,
    Steps,
)

Tensor = torch.Tensor
Values = dict[str, Tensor]
RING, BROADCAST, GATHER, STATIONARY = "ring", "broadcast", "gather", "stationary"


class Pieces(Protocol):
    """Runs the pieces of a body, eagerly or compiled."""

    def forward(
        self, index: int, symbols: Mapping[Any, Any], step: Tensor, values: Values
    ) -> Values: ...

    def backward(
        self,
        index: int,
        symbols: Mapping[Any, Any],
        step: Tensor,
        values: Values,
        cotangents: Values,
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
    rows: int  # c
    length: int

    @property
    def layout(self) -> Layout:
        return Layout(self.axis.size, self.body.order)

    @property
    def local_rows(self) -> int:
        return self.layout.chunks * self.rows

    @property
    def dtype(self) -> torch.dtype:
        return self.shards[0].dtype

    def symbols(self, rows: int) -> dict[Any, Any]:
        return symbol_values(self.body, self.sizes, rows)

    def lead(self, size: Any) -> int:
        return evaluate(size, self.symbols(self.local_rows))

    def spec(self, a: Attention) -> attn.Spec:
        return attn.Spec(a.causal, a.scale, self.rows, self.length)

    def step(self, j: int) -> Tensor:
        return torch.tensor(j, device=self.shards[0].device)

    def local_tokens(self) -> Values:
        """This rank's rows of every token; a mask stays whole."""
        masks = {a.mask for a in self.body.attentions}
        out: Values = {}
        for spec, t in zip(self.body.tokens, self.tokens):
            if spec.whole and spec.name not in masks:
                lead = self.lead(spec.lead)
                t = take(self.layout, self.axis.rank, t, spec.dim, lead, self.rows, self.length)
            out[spec.name] = t
        return out

    def flat(self) -> Tensor:
        """This rank's shards in one buffer."""
        return torch.cat([s.reshape(-1) for s in self.shards])

    def unpack(self, flat: Tensor) -> Values:
        parts = flat.split([s.numel() for s in self.shards])
        return {n: p.view(s.shape) for n, p, s in zip(self.body.shards, parts, self.shards)}

    def invariant_values(self) -> Values:
        return dict(zip(self.body.invariants, self.invariants))

    def shape(self, name: str, rows: int) -> list[int]:
        symbols = self.symbols(rows)
        return [evaluate(s, symbols) for s in self.body.values[name].shape]


def forward(call: Call) -> Steps:
    """-> (sums and stacks in the order of body.outs, saved)."""
    if call.schedule == STATIONARY:
        return (yield from _stationary_forward(call))
    body, axis = call.body, call.axis
    fixed = {**call.local_tokens(), **call.invariant_values()}
    symbols = call.symbols(call.local_rows)
    sums: Values = {}
    stacks = _empty_stacks(call)
    source = _Weights(call)
    for _ in range(axis.size):
        j, flat = yield from source.next()
        if j * body.units >= body.size:
            continue
        values = {**fixed, **call.unpack(flat)}
        for index, s in enumerate(body.steps):
            if isinstance(s, Piece):
                values.update(call.pieces.forward(index, symbols, call.step(j), values))
            else:
                q, k, v, mask = _operands(s, values)
                out, lse = yield from attn.attention(axis, call.layout, q, k, v, mask, call.spec(s))
                values[s.out], values[s.lse] = out, lse
                stacks[s.out][j], stacks[s.lse][j] = out, lse
        _collect(body, values, sums, stacks, j)
    return _results(body, sums, stacks)


def _operands(s: Attention, values: Values) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return values[s.q], values[s.k], values[s.v], values[s.mask] if s.mask else None


def _empty_stacks(call: Call) -> Values:
    """[D, local] for everything that is kept per j; a step of pads only leaves -inf in a log-sum-exp, else zero."""
    out: Values = {}
    names = [
        (o.name, -torch.inf if o.kind == "lse" else 0.0) for o in call.body.outs if o.kind != "sum"
    ]
    names += [(n, 0.0) for a in call.body.attentions for n in (a.out, a.lse)]
    for name, fill in names:
        shape = [call.axis.size, *call.shape(name, call.local_rows)]
        dtype = call.body.values[name].dtype
        make = torch.empty if call.body.real_steps() == call.axis.size else torch.zeros
        t = make(shape, dtype=dtype, device=call.shards[0].device)
        if fill and call.body.real_steps() != call.axis.size:
            t.fill_(fill)
        out[name] = t
    return out


def _collect(body: Body, values: Values, sums: Values, stacks: Values, j: int) -> None:
    for o in body.outs:
        x = values[o.name]
        if o.kind == "sum":
            _add(sums, o.name, x)
        elif o.name not in {n for a in body.attentions for n in (a.out, a.lse)}:
            stacks[o.name][j] = x


def _add(total: Values, name: str, x: Tensor) -> None:
    """Sums in fp32 or wider."""
    if name in total:
        total[name] += x
    else:
        total[name] = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _results(body: Body, sums: Values, stacks: Values) -> tuple[list[Tensor], list[Tensor]]:
    outs = [
        sums[o.name].to(body.values[o.name].dtype) if o.kind == "sum" else stacks[o.name]
        for o in body.outs
    ]
    return outs, [stacks[n] for a in body.attentions for n in (a.out, a.lse)]


class _Weights:
    """The shards in time: `j, flat = yield from next()`; the next one is in flight while the caller computes."""

    def __init__(self, call: Call):
        self.call, self.turn = call, 0
        self.flat: Tensor | None = None
        self.handle: Handle | None = None
        self.blocks: Tensor | None = None

    def next(self) -> Steps:
        call, axis, turn = self.call, self.call.axis, self.turn
        self.turn += 1
        if call.schedule == GATHER:
            if self.blocks is None:
                handle = yield AllGather(call.flat(), "weights")
                self.blocks = handle.wait()
            assert self.blocks is not None
            return turn, self.blocks[turn]
        if call.schedule == RING:
            self.flat = call.flat() if self.handle is None else self.handle.wait()
            if turn + 1 < axis.size:
                self.handle = yield Shift(self.flat, "weights")
            return (axis.rank - turn) % axis.size, self.flat
        if self.handle is None:
            self.handle = yield self.broadcast(0)
        flat = self.handle.wait()
        if turn + 1 < axis.size:
            self.handle = yield self.broadcast(turn + 1)
        return turn, flat

    def broadcast(self, j: int) -> Broadcast:
        own = self.call.flat()
        mine = own if j == self.call.axis.rank else torch.empty_like(own)
        return Broadcast(mine, "weights", source=j)


def backward(call: Call, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Steps:
    """Cotangents of body.outs (None: zero) -> gradients of tokens, invariants and this rank's shards, None without."""
    if call.schedule == STATIONARY:
        return (yield from _stationary_backward(call, saved, cotangents))
    body, axis = call.body, call.axis
    fixed = {**call.local_tokens(), **call.invariant_values()}
    symbols = call.symbols(call.local_rows)
    stored = dict(zip([n for a in body.attentions for n in (a.out, a.lse)], saved))
    total: Values = {}
    source, sink = _Weights(call), _Gradients(call)
    for _ in range(axis.size):
        j, flat = yield from source.next()
        if j * body.units < body.size:
            values = {**fixed, **call.unpack(flat), **{n: t[j] for n, t in stored.items()}}
            given = _given(body, cotangents, lambda t, j=j: t[j])
            grads = yield from _step_backward(call, symbols, j, values, given, False)
            for name in (*fixed,):
                if name in grads:
                    _add(total, name, grads.pop(name))
        else:
            grads = {}
        yield from sink.put(j, grads)
    shards = yield from sink.done()
    return _gradients(call, total, shards)


def _given(body: Body, cotangents: Sequence[Tensor | None], block: Any) -> Values:
    return {
        o.name: g if o.kind == "sum" else block(g)
        for o, g in zip(body.outs, cotangents)
        if g is not None
    }


def _step_backward(
    call: Call, symbols: dict[Any, Any], j: int, values: Values, given: Values, resident: bool
) -> Steps:
    """Gradients of all operands of one step; pieces before the last are recomputed. resident: tokens of all ranks."""
    body, step = call.body, call.step(j)
    last = max(i for i, s in enumerate(body.steps) if isinstance(s, Piece))
    for index, s in enumerate(body.steps):
        if isinstance(s, Piece) and index < last:
            kept = {a.out for a in body.attentions}
            made = call.pieces.forward(index, symbols, step, values)
            values.update({n: t for n, t in made.items() if n not in kept})
    grads: Values = {}
    for n, g in given.items():
        _add(grads, n, g)
    for index in reversed(range(len(body.steps))):
        s = body.steps[index]
        if isinstance(s, Piece):
            mine = {n: grads.pop(n) for n in s.writes if n in grads}
            if mine:
                for n, g in call.pieces.backward(index, symbols, step, values, mine).items():
                    _add(grads, n, g)
            continue
        g = grads.pop(s.out, None)
        out, lse = values[s.out], values[s.lse]
        g = torch.zeros_like(out) if g is None else g.to(out.dtype)
        q, k, v, mask = _operands(s, values)
        if resident:
            dq, dk, dv = _whole_attention_backward(call, s, g, q, k, v, mask, out, lse)
        else:
            dq, dk, dv = yield from attn.attention_backward(
                call.axis, call.layout, g, q, k, v, mask, out, lse, call.spec(s)
            )
        for n, d in ((s.q, dq), (s.k, dk), (s.v, dv)):
            _add(grads, n, d)
    return grads


class _Gradients:
    """Weight gradients on their way to their owner: with the shard (ring), by reduce, or by reduce-scatter."""

    def __init__(self, call: Call):
        self.call = call
        self.names = [n for n in call.body.shards if call.body.values[n].requires_grad]
        self.handle: Handle | None = None
        self.pending: list[Handle] = []
        self.mine: Tensor | None = None
        self.blocks: list[Tensor] = []

    def pack(self, grads: Values) -> Tensor:
        parts = []
        for n, s in zip(self.call.body.shards, self.call.shards):
            if n in self.names:
                g = grads.get(n)
                wide = torch.promote_types(s.dtype, torch.float32)
                parts.append(
                    s.new_zeros(s.numel(), dtype=wide) if g is None else g.reshape(-1).to(wide)
                )
        return torch.cat(parts)

    def put(self, j: int, grads: Values) -> Steps:
        call = self.call
        if not self.names:
            return
        flat = self.pack(grads)
        if call.schedule == RING:
            if self.handle is not None:
                flat += self.handle.wait()
            self.handle = yield Shift(flat, "weights")
        elif call.schedule == BROADCAST:
            handle = yield Reduce(flat, "weights", target=j)
            self.pending.append(handle)
            if len(self.pending) == 2:
                self.take(self.pending.pop(0))
        else:
            self.blocks.append(flat)

    def take(self, handle: Handle) -> None:
        got = handle.wait()
        self.mine = self.mine if got is None else got

    def done(self) -> Steps:
        """Gradient of each of this rank's shards."""
        if not self.names:
            return {}
        if self.call.schedule == RING:
            assert self.handle is not None
            self.mine = self.handle.wait()
        for handle in self.pending:
            self.take(handle)
        if self.blocks:
            handle = yield ReduceScatter(torch.stack(self.blocks), "weights")
            self.mine = handle.wait()
        assert self.mine is not None
        shards = dict(zip(self.call.body.shards, self.call.shards))
        parts = self.mine.split([shards[n].numel() for n in self.names])
        return {n: p.view(shards[n].shape).clone() for n, p in zip(self.names, parts)}


def _gradients(call: Call, total: Values, shards: Values) -> tuple[list, list, list]:
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


# stationary: tokens of all ranks come to the shard


def _gather_tokens(call: Call) -> Steps:
    """Every token's rows of all ranks end to end in rank order; the chunk order is undone."""
    masks = {a.mask for a in call.body.attentions}
    out: Values = {}
    for spec, t in zip(call.body.tokens, call.tokens):
        lead = call.lead(spec.lead)
        if spec.name in masks:
            out[spec.name] = t
        elif spec.whole:
            blocks = [
                take(call.layout, r, t, spec.dim, lead, call.rows, call.length)
                for r in range(call.axis.size)
            ]
            out[spec.name] = _natural(
                call, join(torch.stack(blocks), spec.dim, lead), spec.dim, lead
            )
        else:
            handle = yield AllGather(t)
            out[spec.name] = _natural(call, join(handle.wait(), spec.dim, lead), spec.dim, lead)
    return out


def _chunks(call: Call, x: Tensor, dim: int, lead: int, order: Sequence[int]) -> Tensor:
    """Reorder the chunks of all ranks along the sequence."""
    if call.layout.chunks == 1:
        return x
    n = call.axis.size * call.layout.chunks
    parts = x.reshape(*x.shape[:dim], lead, n, -1, *x.shape[dim + 1 :])
    at = torch.tensor(list(order), device=x.device)
    return parts.index_select(dim + 1, at).reshape(x.shape)


def _natural(call: Call, x: Tensor, dim: int, lead: int) -> Tensor:
    at = {g: i for i, g in enumerate(call.layout.all_chunk_ids())}
    return _chunks(call, x, dim, lead, [at[g] for g in range(len(at))])


def _by_rank(call: Call, x: Tensor, dim: int, lead: int) -> Tensor:
    """Natural order -> [D, local]."""
    x = _chunks(call, x, dim, lead, call.layout.all_chunk_ids())
    return part(x, call.axis.size, dim, lead).contiguous()


def _all_chunks(call: Call) -> list[int]:
    return list(range(call.axis.size * call.layout.chunks))


def _stationary_forward(call: Call) -> Steps:
    body, axis = call.body, call.axis
    values = yield from _gather_tokens(call)
    values.update(call.invariant_values())
    values.update(call.unpack(call.flat()))
    symbols = call.symbols(axis.size * call.local_rows)
    step = call.step(axis.rank)
    for index, s in enumerate(body.steps):
        if isinstance(s, Piece):
            values.update(call.pieces.forward(index, symbols, step, values))
        else:
            q, k, v, mask = _operands(s, values)
            k, v = (x[:, :, : call.length] for x in (k, v))
            out, lse = attn.attend(q, k, v, _all_chunks(call), call.spec(s), mask)
            values[s.out], values[s.lse] = out, lse
    real = axis.rank * body.units < body.size
    outs = []
    for o in body.outs:
        lead = call.lead(o.lead)
        x = values[o.name]
        if not real:
            x = torch.full_like(x, -torch.inf if o.kind == "lse" else 0.0)
        blocks = _by_rank(call, x, o.dim, lead)
        if o.kind == "sum":
            wide = torch.promote_types(x.dtype, torch.float32)
            handle = yield ReduceScatter(blocks.to(wide))
            outs.append(handle.wait().to(x.dtype))
        else:
            handle = yield AllToAll(blocks)
            outs.append(handle.wait())
    saved = [_by_rank(call, values[n], 2, 1) for a in body.attentions for n in (a.out, a.lse)]
    return outs, saved


def _whole_attention_backward(
    call: Call,
    s: Attention,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (x[:, :, : call.length] for x in (k, v))
    dq, dk, dv = attn.attend_backward(
        g, q, keys, values, out, lse, _all_chunks(call), call.spec(s), mask
    )
    missing = k.shape[2] - call.length
    if missing:
        dk, dv = (torch.nn.functional.pad(d, (0, 0, 0, missing)) for d in (dk, dv))
    return dq, dk, dv


def _stationary_backward(
    call: Call, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> Steps:
    body, axis = call.body, call.axis
    values = yield from _gather_tokens(call)
    values.update(call.invariant_values())
    values.update(call.unpack(call.flat()))
    names = [n for a in body.attentions for n in (a.out, a.lse)]
    for n, t in zip(names, saved):
        values[n] = _natural(call, join(t, 2, 1), 2, 1)
    given: Values = {}
    for o, g in zip(body.outs, cotangents):
        if g is None:
            continue
        lead = call.lead(o.lead)
        if o.kind == "sum":
            handle = yield AllGather(g)
        else:
            handle = yield AllToAll(g)
        given[o.name] = _natural(call, join(handle.wait(), o.dim, lead), o.dim, lead)
    symbols = call.symbols(axis.size * call.local_rows)
    real = axis.rank * body.units < body.size
    grads: Values = {}
    if real:
        grads = yield from _step_backward(call, symbols, axis.rank, values, given, True)
    total: Values = {}
    for spec in body.tokens:
        if not body.values[spec.name].requires_grad:
            continue
        lead = call.lead(spec.lead)
        g = grads.pop(spec.name, None)
        if g is None:
            g = torch.zeros_like(values[spec.name])
        wide = torch.promote_types(values[spec.name].dtype, torch.float32)
        handle = yield ReduceScatter(_by_rank(call, g.to(wide), spec.dim, lead))
        total[spec.name] = handle.wait()
    for name in body.invariants:
        if name in grads:
            total[name] = grads.pop(name)
    return _gradients(call, total, grads)


def choose(body: Body, ranks: int, sizes: Sequence[int], rows: int) -> str:
    """The schedule of a call: what the options ask for, else the one that moves fewest elements in a step.

    Closed forms of DESIGN section 10 over forward and backward, f = (D-1)/D dropped: ring and broadcast 3w (+3k with an
    exchange), stationary 5n; a function of rank-independent sizes only.
    """
    folded = BROADCAST if body.attentions else RING
    asked = body.schedule
    if asked == RING and body.attentions:
        return BROADCAST
    if asked != "auto":
        return asked
    layout = Layout(ranks, body.order)
    symbols = symbol_values(body, sizes, layout.chunks * rows * ranks)
    weights = 3 * body.weight_elements * ranks
    for a in body.attentions:
        weights += 3 * 2 * ranks * numel(body.values[a.k].shape, symbols)
    live = [t for t in body.tokens if body.values[t.name].requires_grad]
    tokens = 3 * sum(numel(body.values[t.name].shape, symbols) for t in live)
    tokens += 2 * sum(
        numel(body.values[o.name].shape, symbols) for o in body.outs if o.kind == "sum"
    )
    return STATIONARY if tokens < weights else folded
