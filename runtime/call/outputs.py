"""Outputs that leave as DTensors: the rows of the sequence that a rank holds <-> its chunk of
torch's `Shard(dim)`, in order and without pads.

The dim is S * trail elements; torch's chunks cut elements.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tspc.base.context import Context
from tspc.ir.layout import Layout
from tspc.runtime.comm.drivers import distributed
from tspc.runtime.comm.place import Place
from tspc.runtime.comm.requests import Axis, Exchange, Steps


def _held(layout: Layout, rank: int, rows: int, length: int, trail: int) -> torch.Tensor:
    """The element of the dim at each local place, -1 in pads."""
    at = [torch.arange(g * rows, (g + 1) * rows) for g in layout.chunk_ids(rank)]
    position = torch.cat(at)
    elements = position[:, None] * trail + torch.arange(trail)
    return torch.where(position[:, None] < length, elements, -1).flatten()


def _routes(
    layout: Layout, rank: int, rows: int, length: int, trail: int
) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int], int]:
    """(local places in the order sent, places of the chunk in the order received, how many go to
    each rank, how many come from each, the chunk's length)."""
    chunk = -(-length * trail // layout.ranks)
    start, end = (min(r * chunk, length * trail) for r in (rank, rank + 1))
    mine = _held(layout, rank, rows, length, trail)
    places = mine.argsort()[(mine < 0).sum() :]
    sent = torch.bincount(mine[places] // chunk, minlength=layout.ranks)
    got = []
    for source in range(layout.ranks):
        theirs = _held(layout, source, rows, length, trail).sort().values
        got.append(theirs[(theirs >= start) & (theirs < end)] - start)
    return places, torch.cat(got), sent.tolist(), [len(g) for g in got], end - start


def to_chunks(
    axis: Axis, layout: Layout, x: torch.Tensor, dim: int, rows: int, length: int
) -> Steps:
    """The rows of this rank -> its chunk."""
    trail = x.shape[dim] // (layout.chunks * rows)
    places, at, sent, received, size = _routes(layout, axis.rank, rows, length, trail)
    x = x.movedim(dim, 0)
    handle = yield Exchange(x[places.to(x.device)], "activations", tuple(sent), tuple(received))
    out = x.new_empty((size, *x.shape[1:]))
    out[at.to(x.device)] = handle.wait()
    return out.movedim(0, dim).contiguous()


def from_chunks(
    axis: Axis, layout: Layout, g: torch.Tensor, dim: int, rows: int, length: int, trail: int
) -> Steps:
    """The transpose of `to_chunks`: zero in pads."""
    places, at, sent, received, _ = _routes(layout, axis.rank, rows, length, trail)
    g = g.movedim(dim, 0)
    handle = yield Exchange(g[at.to(g.device)], "activations", tuple(received), tuple(sent))
    out = g.new_zeros((layout.chunks * rows * trail, *g.shape[1:]))
    out[places.to(g.device)] = handle.wait()
    return out.movedim(0, dim).contiguous()


class _Chunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: torch.Tensor,
        place: Place,
        layout: Layout,
        dim: int,
        rows: int,
        length: int,
    ) -> torch.Tensor:
        ctx.rest = place, layout, dim, rows, length, x.shape[dim] // (layout.chunks * rows)
        steps = to_chunks(place.axis, layout, x, dim, rows, length)
        return distributed(steps, place.axis, place.groups, "an output as a DTensor")

    @staticmethod
    def backward(ctx: Context, *gs: torch.Tensor) -> object:
        (g,), (place, layout, dim, rows, length, trail) = gs, ctx.rest
        steps = from_chunks(place.axis, layout, g, dim, rows, length, trail)
        local = distributed(steps, place.axis, place.groups, "the gradient of a DTensor output")
        return local, None, None, None, None, None


def sharded(
    x: torch.Tensor,
    place: Place,
    mesh: DeviceMesh,
    layout: Layout,
    dim: int,
    rows: int,
    length: int,
    shape: tuple[int, ...],
) -> DTensor:
    """A collective, also in the backward: the output as a DTensor cut along `dim`."""
    local = _Chunk.apply(x, place, layout, dim, rows, length)
    like = torch.empty(shape, device="meta")
    return DTensor.from_local(
        local, mesh, [Shard(dim)], run_check=False, shape=like.shape, stride=like.stride()
    )
