"""Outputs that leave as DTensors: the rows of the sequence that a rank holds <-> its chunk of
torch's `Shard(dim)`, in order and without pads.

The dim is S * trail elements; torch's chunks cut elements.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Shard

from tspc.base.context import Context
from tspc.ir.layout import Span
from tspc.runtime.comm.drivers import distributed
from tspc.runtime.comm.place import Place
from tspc.runtime.comm.requests import Axis, Exchange, Steps


def _held(span: Span, rank: int, trail: int) -> torch.Tensor:
    """The element of the dim at each local place, -1 in pads."""
    c = span.rows
    at = [torch.arange(g * c, (g + 1) * c) for g in span.layout.chunk_ids(rank)]
    position = torch.cat(at)
    elements = position[:, None] * trail + torch.arange(trail)
    return torch.where(position[:, None] < span.length, elements, -1).flatten()


def _routes(
    span: Span, rank: int, trail: int
) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int], int]:
    """(local places in the order sent, places of the chunk in the order received, how many go to
    each rank, how many come from each, the chunk's length)."""
    ranks, size = span.layout.ranks, span.length * trail
    chunk = -(-size // ranks)
    start, end = (min(r * chunk, size) for r in (rank, rank + 1))
    held = _held(span, rank, trail)
    places = held.argsort()[(held < 0).sum() :]
    sent = torch.bincount(held[places] // chunk, minlength=ranks)
    got = []
    for source in range(ranks):
        theirs = _held(span, source, trail).sort().values
        got.append(theirs[(theirs >= start) & (theirs < end)] - start)
    return places, torch.cat(got), sent.tolist(), [len(g) for g in got], end - start


def to_chunks(axis: Axis, span: Span, x: torch.Tensor, dim: int) -> Steps:
    """The rows of this rank -> its chunk."""
    trail = x.shape[dim] // span.local
    places, at, sent, received, size = _routes(span, axis.rank, trail)
    x = x.movedim(dim, 0)
    handle = yield Exchange(x[places.to(x.device)], "activations", tuple(sent), tuple(received))
    out = x.new_empty((size, *x.shape[1:]))
    out[at.to(x.device)] = handle.wait()
    return out.movedim(0, dim).contiguous()


def from_chunks(axis: Axis, span: Span, g: torch.Tensor, dim: int, trail: int) -> Steps:
    """The transpose of `to_chunks`: zero in pads."""
    places, at, sent, received, _ = _routes(span, axis.rank, trail)
    g = g.movedim(dim, 0)
    handle = yield Exchange(g[at.to(g.device)], "activations", tuple(received), tuple(sent))
    out = g.new_zeros((span.local * trail, *g.shape[1:]))
    out[places.to(g.device)] = handle.wait()
    return out.movedim(0, dim).contiguous()


class _Chunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, place: Place, span: Span, dim: int) -> torch.Tensor:
        ctx.rest = place, span, dim, x.shape[dim] // span.local
        steps = to_chunks(place.axis, span, x, dim)
        return distributed(steps, place.axis, place.groups, "an output as a DTensor")

    @staticmethod
    def backward(ctx: Context, *gs: torch.Tensor) -> object:
        (g,), (place, span, dim, trail) = gs, ctx.rest
        steps = from_chunks(place.axis, span, g, dim, trail)
        local = distributed(steps, place.axis, place.groups, "the gradient of a DTensor output")
        return local, None, None, None


def sharded(x: torch.Tensor, place: Place, span: Span, dim: int, shape: tuple[int, ...]) -> DTensor:
    """A collective, also in the backward: the output as a DTensor cut along `dim`."""
    local = _Chunk.apply(x, place, span, dim)
    like = torch.empty(shape, device="meta")
    return DTensor.from_local(
        local, place.mesh, [Shard(dim)], run_check=False, shape=like.shape, stride=like.stride()
    )
