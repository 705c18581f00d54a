"""What tspc's ops do on ranks: each is a generator of communications, run by the distributed or
the lockstep driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tspc.base.state import CODE, remembered
from tspc.ir.body import BODIES, Body
from tspc.ir.layout import Layout
from tspc.ops import sequence as ops  # noqa: F401  defines them
from tspc.ops.library import LIB
from tspc.runtime.attention import kernels as attn
from tspc.runtime.comm import exchange
from tspc.runtime.comm import halo as along
from tspc.runtime.comm.drivers import distributed
from tspc.runtime.comm.failures import Lost
from tspc.runtime.comm.place import PLACES, chunk_rows
from tspc.runtime.comm.requests import Axis, Steps
from tspc.runtime.fold import schedules
from tspc.runtime.fold.pieces import EagerPieces
from tspc.runtime.fold.step import Call

GENERATORS: dict[str, Callable[..., Steps]] = remembered(CODE, {})


def _steps(name: str) -> Callable[[Callable[..., Steps]], Callable[..., Steps]]:
    """Register a generator function (axis, *arguments of the op) and the op's implementation."""

    def register(fn: Callable[..., Steps]) -> Callable[..., Steps]:
        GENERATORS[name], what = fn, f"tspc::{name}"

        def run(*args: Any) -> object:
            place = PLACES[args[-1]]
            return distributed(fn(place.axis, *args), place.axis, place.groups, what)

        LIB.impl(name, run, "CompositeExplicitAutograd")
        return fn

    return register


def _nothing(result: Any) -> Steps:
    """A generator without communication."""
    return result
    yield


@torch.compiler.disable
def _whole_weight(local: torch.Tensor, dim: int, size: int, cut: bool, name: str) -> torch.Tensor:
    """Outside of tspc's graphs (eager code of the model) the chunks are gathered as they are
    stored."""
    if dim < 0:
        return local.clone()
    place = PLACES[name]
    if cut:
        (local,) = place.gather([local], [dim], [chunk_rows(place.axis, size)])
    missing = -(-size // place.axis.size) - local.shape[dim]
    if missing:
        shape = list(local.shape)
        shape[dim] = missing
        local = torch.cat([local, local.new_zeros(shape)], dim)
    steps = exchange.gather_weight(place.axis, local, dim, size)
    return distributed(steps, place.axis, place.groups, "the read of a whole weight")


@torch.compiler.disable
def _whole_weight_backward(
    g: torch.Tensor, dim: int, size: int, cut: bool, name: str, rows: int
) -> torch.Tensor:
    """Eager code runs alike on all ranks: the gradient of the chunk is its part of the whole
    one."""
    place = PLACES[name]
    if dim >= 0:
        axis = place.axis
        start = min(axis.rank * -(-size // axis.size), size)
        g = g.narrow(dim, start, chunk_rows(axis, size))
    (mine,) = place.mean([g], [dim if cut else None])
    return mine.clone(memory_format=torch.contiguous_format)


LIB.impl("whole_weight", _whole_weight, "CompositeExplicitAutograd")
LIB.impl("whole_weight_backward", _whole_weight_backward, "CompositeExplicitAutograd")


@_steps("whole")
@_steps("local_backward")
def _whole(axis, x, dim, lead, trail, rows, length, order, name):
    return exchange.whole(axis, Layout(axis.size, order), x, dim, lead, rows, length)


@_steps("local")
def _local(axis, x, dim, lead, trail, rows, length, order, name):
    layout = Layout(axis.size, order)
    return _nothing(exchange.take(layout, axis.rank, x, dim, lead, rows, length))


@_steps("whole_backward")
def _whole_backward(axis, g, dim, lead, trail, rows, length, order, name):
    layout = Layout(axis.size, order)
    local = exchange.take(layout, axis.rank, g, dim, lead, rows, length)
    return _nothing(exchange.clear(layout, axis.rank, local, dim, lead, rows, length))


@_steps("clear_pads")
def _clear_pads(axis, x, dim, lead, trail, rows, length, order, name):
    layout = Layout(axis.size, order)
    return _nothing(exchange.clear(layout, axis.rank, x, dim, lead, rows, length))


@_steps("extend")
def _extend(axis, x, left, right, way, dim, lead, trail, rows, length, order, name):
    tiles = along.Tiles(Layout(axis.size, order), lead, trail, rows, length)
    return along.moved(axis, x, dim, along.plan(tiles, left, right, way))


@_steps("extend_backward")
def _extend_backward(axis, g, left, right, way, dim, lead, trail, rows, length, order, name):
    tiles = along.Tiles(Layout(axis.size, order), lead, trail, rows, length)
    return along.moved(axis, g, dim, along.plan(tiles, left, right, way).back())


@_steps("carry")
def _carry(axis, x, dim, lead, after, order, name):
    return along.carry(axis, Layout(axis.size, order), x, dim, lead, after)


@_steps("tile_conv")
def _tile_conv(axis, x, weight, bias, dilation, groups, tiles, name):
    return _nothing(along.convolution(x, weight, bias, dilation, groups, tiles))


@_steps("tile_conv_backward")
def _tile_conv_backward(axis, g, x, weight, dilation, groups, tiles, wanted, name):
    return _nothing(along.convolution_backward(g, x, weight, dilation, groups, tiles, wanted))


@_steps("all_reduce")
def _all_reduce(axis, x, name):
    return exchange.all_reduce(axis, x)


@_steps("vary")
def _vary(axis, xs, reduce, name):
    return _nothing([x.clone(memory_format=torch.contiguous_format) for x in xs])


@_steps("vary_backward")
def _vary_backward(axis, gs, reduce, name):
    return exchange.bucket_all_reduce(axis, gs, reduce)


@_steps("gather_weight")
def _gather_weight(axis, shard, dim, size, partial, dtype, reduce, name):
    return exchange.gather_weight(axis, shard.to(dtype), dim, size)


@_steps("gather_weight_backward")
def _gather_weight_backward(axis, g, dim, units, partial, dtype, reduce, name):
    return exchange.gather_weight_backward(axis, g, dim, units, partial, dtype, reduce)


@_steps("embed")
def _embed(axis, shard, ids, padding, scaled, dtype, rows, length, order, name):
    return exchange.embed(axis, Layout(axis.size, order), shard, ids, dtype, rows, length)


@_steps("embed_backward")
def _embed_backward(axis, g, ids, units, padding, scaled, dtype, rows, length, order, name):
    layout, rest = Layout(axis.size, order), (padding, scaled, dtype, rows, length)
    return exchange.embed_backward(axis, layout, g, ids, units, *rest)


def _attends(axis, causal, scale, dropout, predicate, sizes, fill, score, rows, lengths, orders):
    """The spans of queries and keys, and what the attention is."""
    spans = [
        attn.Span(Layout(axis.size, order), c, n) for order, c, n in zip(orders, rows, lengths)
    ]
    told = (predicate, tuple(sizes), fill, score)
    return spans, attn.Spec(causal, scale, rows[0], lengths[0], dropout, *told, lengths[1])


@_steps("attention")
def _attention(axis, q, k, v, mask, states, data, *rest):
    spans, spec = _attends(axis, *rest[:-1])
    return attn.attention(axis.rank, spans, q, k, v, attn.Given(mask, states, data), spec)


@_steps("attention_backward")
def _attention_backward(axis, g, q, k, v, mask, states, data, out, lse, biased, *rest):
    spans, spec = _attends(axis, *rest[:-1])
    done = (attn.Given(mask, states, data), out, lse)
    return attn.attention_backward(axis.rank, spans, g, q, k, v, *done, biased, spec)


@_steps("fold")
def _fold(axis, tokens, invariants, shards, sizes, rows, lengths, region, key, name):
    call = _call(axis, BODIES[key], tokens, invariants, shards, sizes, rows, lengths)
    try:
        outs, saved = yield from schedules.forward(call)
    except Lost as e:
        e.places.append(_where(region, call))
        raise
    return _apart([*outs, *saved], [*tokens, *invariants, *shards])


@_steps("fold_backward")
def _fold_backward(
    axis, gs, tokens, invariants, shards, saved, sizes, rows, lengths, region, key, name
):
    call = _call(axis, BODIES[key], tokens, invariants, shards, sizes, rows, lengths)
    try:
        grads = yield from schedules.backward(call, saved, gs)
    except Lost as e:
        e.places.append(_where(region, call))
        raise
    given = [g for g in (*gs, *tokens, *invariants, *shards, *saved) if g is not None]
    return _apart([g for part in grads for g in part if g is not None], given)


def _where(region: str, call: Call) -> str:
    step = f", step {call.turn} of {call.axis.size}" if call.turn else ""
    return f"region {region!r} ({call.schedule}{step})"


def _apart(results: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each contiguous in memory of its own, as an op must give it; copied only where it is not."""
    taken = {x.untyped_storage().data_ptr() for x in given}
    out = []
    for x in results:
        held = x.untyped_storage()
        if held.data_ptr() in taken or held.nbytes() > x.nbytes or not x.is_contiguous():
            x = x.clone(memory_format=torch.contiguous_format)
        taken.add(x.untyped_storage().data_ptr())
        out.append(x)
    return out


def _call(
    axis: Axis,
    body: Body,
    tokens: Sequence[torch.Tensor],
    invariants: Sequence[torch.Tensor],
    shards: Sequence[torch.Tensor],
    sizes: Sequence[int],
    rows: Sequence[int],
    lengths: Sequence[int],
) -> Call:
    pieces = body.compiled.get("pieces") or EagerPieces(body)
    schedule = schedules.choose(body, axis.size, sizes, rows)
    tokens = [t.contiguous() for t in tokens]
    return Call(axis, body, pieces, schedule, tokens, invariants, shards, sizes, rows, lengths)
