"""The fold at run time: y = sum_j body(tokens, invariants, shard j) under each schedule, forward
and backward.

Every schedule takes and returns the same tensors (docs/design.md, "The idea"): sums [local], stacks
[D, local] by j, and saved attention outputs with their log-sum-exp [D, local]. Sums over j are in
fp32 or wider and are cast once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tspc.cost.model import RING, STATIONARY, fastest, folded
from tspc.ir.body import Body, Piece
from tspc.runtime.comm.requests import Steps
from tspc.runtime.fold.stationary import stationary_backward, stationary_forward
from tspc.runtime.fold.step import (
    Call,
    Exchange,
    Sums,
    Values,
    attended,
    in_operand_order,
    step_backward,
)
from tspc.runtime.fold.travel import Gradients, Weights

Tensor = torch.Tensor


def forward(call: Call) -> Steps[tuple[list[Tensor], list[Tensor]]]:
    """-> (sums and stacks in the order of body.outs, saved)."""
    if call.schedule == STATIONARY:
        return (yield from stationary_forward(call))
    fixed = {**call.local_tokens(), **call.invariant_values()}
    sums = Sums()
    stacks = _empty_stacks(call)
    source, exchange = Weights(call), Exchange(call)
    yield from exchange.start(fixed)
    for _ in range(call.axis.size):
        yield from _turn(call, source, exchange, fixed, sums, stacks)
    return _results(call.body, sums, stacks)


def _turn(
    call: Call, source: Weights, exchange: Exchange, fixed: Values, sums: Sums, stacks: Values
) -> Steps[None]:
    """One step of the sum; its shard is let go before the one after the next is asked for."""
    body = call.body
    j, shards = yield from source.next()
    if j * body.units >= body.size:
        return
    symbols = call.symbols()
    values = {**fixed, **shards}
    for index, s in enumerate(body.steps):
        if isinstance(s, Piece):
            values.update(call.pieces.forward(index, symbols, call.step(j), values))
        else:
            values[s.out], values[s.lse] = yield from attended(exchange, s, values)
    _collect(body, values, sums, stacks, j)


def _empty_stacks(call: Call) -> Values:
    """[D, local] for everything that is kept per j; a step of pads only leaves -inf in a log-sum-
    exp, else zero."""
    out: Values = {}
    names = [
        (o.name, -torch.inf if o.kind == "lse" else 0.0) for o in call.body.outs if o.kind != "sum"
    ]
    names += [(n, 0.0) for n in call.body.saves]
    for name, fill in names:
        shape = [call.axis.size, *call.shape(name)]
        dtype = call.body.values[name].dtype
        make = torch.empty if call.body.real_steps() == call.axis.size else torch.zeros
        t = make(shape, dtype=dtype, device=call.shards[0].device)
        if fill and call.body.real_steps() != call.axis.size:
            t.fill_(fill)
        out[name] = t
    return out


def _collect(body: Body, values: Values, sums: Sums, stacks: Values, j: int) -> None:
    for o in body.outs:
        x = values[o.name]
        if o.kind == "sum":
            sums.add(o.name, x)
        elif o.name not in body.saves:
            stacks[o.name][j] = x
    for name in body.saves:
        stacks[name][j] = values[name]


def _results(body: Body, sums: Sums, stacks: Values) -> tuple[list[Tensor], list[Tensor]]:
    outs = [
        sums[o.name].to(body.values[o.name].dtype) if o.kind == "sum" else stacks[o.name]
        for o in body.outs
    ]
    return outs, [stacks[n] for n in body.saves]


def backward(call: Call, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Steps:
    """From the cotangents of body.outs (None: zero) to the gradients of tokens, invariants and this
    rank's shards, None without."""
    if call.schedule == STATIONARY:
        return (yield from stationary_backward(call, saved, cotangents))
    fixed = {**call.local_tokens(), **call.invariant_values()}
    stored = dict(zip(call.body.saves, saved))
    total = Sums()
    source, sink, exchange = Weights(call), Gradients(call), Exchange(call)
    yield from exchange.start(fixed)
    for _ in range(call.axis.size):
        j, grads = yield from _turn_back(call, source, exchange, fixed, stored, cotangents)
        for name in fixed:
            if name in grads:
                total.add(name, grads.pop(name))
        yield from sink.put(j, grads)
        del grads
    yield from exchange.finish(total)
    shards = yield from sink.done()
    return in_operand_order(call, total, shards)


def _turn_back(
    call: Call,
    source: Weights,
    exchange: Exchange,
    fixed: Values,
    stored: Values,
    cotangents: Sequence[Tensor | None],
) -> Steps[tuple[int, Values]]:
    """-> (j, gradients of what its step reads)."""
    body = call.body
    j, shards = yield from source.next()
    if j * body.units >= body.size:
        return j, {}
    values = {**fixed, **shards, **{n: t[j] for n, t in stored.items()}}
    of_outs = _given(body, cotangents, lambda t: t[j])
    symbols = call.symbols()
    return j, (yield from step_backward(call, symbols, j, values, of_outs, exchange))


def _given(
    body: Body, cotangents: Sequence[Tensor | None], block: Callable[[Tensor], Tensor]
) -> Values:
    return {
        o.name: g if o.kind == "sum" else block(g)
        for o, g in zip(body.outs, cotangents)
        if g is not None
    }


def choose(body: Body, ranks: int, sizes: Sequence[int], rows: Sequence[int]) -> str:
    """The schedule of a call: what the options ask for, else the fastest by the cost model.

    rows: c of the layout of each of its sequences.
    """
    if body.schedule == RING:
        return folded(body)
    if body.schedule != "auto":
        return body.schedule
    totals = (e.layout(ranks).chunks * c * ranks for e, c in zip(body.extents, rows))
    return fastest(body, tuple(sizes), *totals)
