"""What tspc's ops do on ranks: each is a generator of communications, run by the distributed or
the lockstep driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tspc.base.state import CODE, remembered
from tspc.ir.body import BODIES
from tspc.ir.layout import Along, Layout, Span
from tspc.ir.spec import AttentionSpec, Operands
from tspc.ops import sequence as ops  # noqa: F401  defines them
from tspc.ops.library import LIB, FoldCall
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
from tspc.seams.compiler import storage_key

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
    (mean,) = place.mean([g], [dim if cut else None])
    return mean.clone(memory_format=torch.contiguous_format)


LIB.impl("whole_weight", _whole_weight, "CompositeExplicitAutograd")
LIB.impl("whole_weight_backward", _whole_weight_backward, "CompositeExplicitAutograd")


@_steps("whole")
@_steps("local_backward")
def _whole(axis, x, *others):
    at = Along(*others)
    return exchange.whole(at.span(axis.size), x, at.dim, at.lead)


@_steps("local")
def _local(axis, x, *others):
    at = Along(*others)
    return _nothing(exchange.take(at.span(axis.size), axis.rank, x, at.dim, at.lead))


@_steps("whole_backward")
def _whole_backward(axis, g, *others):
    at = Along(*others)
    local = exchange.take(at.span(axis.size), axis.rank, g, at.dim, at.lead)
    return _nothing(exchange.clear(at.span(axis.size), axis.rank, local, at.dim, at.lead))


@_steps("clear_pads")
def _clear_pads(axis, x, *others):
    at = Along(*others)
    return _nothing(exchange.clear(at.span(axis.size), axis.rank, x, at.dim, at.lead))


@_steps("extend")
def _extend(axis, x, left, right, way, *others):
    at = Along(*others)
    tiles = along.Tiles(at.span(axis.size), at.lead, at.trail)
    return along.moved(axis, x, at.dim, along.plan(tiles, left, right, way))


@_steps("extend_backward")
def _extend_backward(axis, g, left, right, way, *others):
    at = Along(*others)
    tiles = along.Tiles(at.span(axis.size), at.lead, at.trail)
    return along.moved(axis, g, at.dim, along.plan(tiles, left, right, way).back())


@_steps("carry")
def _carry(axis, x, dim, lead, after, order, name):
    return along.carry(axis, Layout(axis.size, order), x, dim, lead, after)


@_steps("tile_conv")
def _tile_conv(axis, *others):
    return _nothing(along.convolution(*others[:-1]))


@_steps("tile_conv_backward")
def _tile_conv_backward(axis, *others):
    return _nothing(along.convolution_backward(*others[:-1]))


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
def _gather_weight(axis, shard, dim, size, partial, dtype, *_):
    return exchange.gather_weight(axis, shard.to(dtype), dim, size)


@_steps("gather_weight_backward")
def _gather_weight_backward(axis, *others):
    return exchange.gather_weight_backward(axis, *others[:-1])


@_steps("embed")
def _embed(axis, shard, ids, padding, scaled, dtype, *layout):
    return exchange.embed(axis, _span(axis, layout), shard, ids, dtype)


@_steps("embed_backward")
def _embed_backward(axis, g, ids, *others):
    units, padding, scaled, dtype, *layout = others
    span = _span(axis, layout)
    total = yield from exchange.embed_backward(axis, span, g, ids, units, padding, scaled)
    return total.to(dtype)


def _span(axis: Axis, layout: Sequence[Any]) -> Span:
    rows, length, order, _ = layout
    return Span(Layout(axis.size, order), rows, length)


def _meeting(axis: Axis, others: Sequence[Any]) -> attn.Meeting:
    """Of what the op has after its tensors."""
    *fields, sizes, rows, lengths, orders, _ = others
    layouts = (Layout(axis.size, order) for order in orders)
    queries, keys = map(Span, layouts, rows, lengths)
    return attn.Meeting(AttentionSpec(*fields, sizes=tuple(sizes)), queries, keys)


@_steps("attention")
def _attention(axis, *args):
    return attn.attention(axis.rank, Operands(*args[:6]), _meeting(axis, args[6:]))


@_steps("attention_backward")
def _attention_backward(axis, g, *args):
    x, (out, lse, biased, *others) = Operands(*args[:6]), args[6:]
    return attn.attention_backward(axis.rank, g, x, (out, lse), _meeting(axis, others), biased)


@_steps("fold")
def _fold(axis, *args):
    f = FoldCall(*args)
    call = _call(axis, f)
    try:
        outs, saved = yield from schedules.forward(call)
    except Lost as e:
        e.places.append(_where(f.region, call))
        raise
    return _apart([*outs, *saved], [*f.tokens, *f.invariants, *f.shards])


@_steps("fold_backward")
def _fold_backward(axis, gs, saved, *args):
    f = FoldCall(*args)
    call = _call(axis, f)
    try:
        grads = yield from schedules.backward(call, saved, gs)
    except Lost as e:
        e.places.append(_where(f.region, call))
        raise
    read = [g for g in (*gs, *f.tokens, *f.invariants, *f.shards, *saved) if g is not None]
    return _apart([g for part in grads for g in part if g is not None], read)


def _where(region: str, call: Call) -> str:
    step = f", step {call.turn} of {call.axis.size}" if call.turn else ""
    return f"region {region!r} ({call.schedule}{step})"


def _apart(results: Sequence[torch.Tensor], operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each contiguous in memory of its own, as an op must give it; copied only where it is not."""
    taken = {storage_key(x) for x in operands}
    out = []
    for x in results:
        larger = x.untyped_storage().nbytes() > x.nbytes
        if storage_key(x) in taken or larger or not x.is_contiguous():
            x = x.clone(memory_format=torch.contiguous_format)
        taken.add(storage_key(x))
        out.append(x)
    return out


def _call(axis: Axis, f: FoldCall) -> Call:
    body = BODIES[f.key]
    pieces = body.compiled.get("pieces") or EagerPieces(body)
    schedule = schedules.choose(body, axis.size, f.sizes, f.rows)
    tokens = [t.contiguous() for t in f.tokens]
    values = (tokens, f.invariants, f.shards, f.sizes, f.rows, f.lengths)
    return Call(axis, body, pieces, schedule, *values)
