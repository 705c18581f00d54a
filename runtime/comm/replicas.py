"""Over the data-parallel axis, as generators: parts of chunks -> the chunks, and gradients -> their
means, of the chunks or of the parts.

A chunk is this rank's of the TSP axis, a part torch's chunk of it; parts may differ in length or be
empty and travel padded. Tensors of one dtype travel together, up to `BUCKET` bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tspc.runtime.comm.exchange import summing
from tspc.runtime.comm.requests import AllGather, AllReduce, Axis, ReduceScatter, Steps

BUCKET = 32 * 2**20
LINK = "replicas"


def gather(
    axis: Axis, parts: Sequence[torch.Tensor], dims: Sequence[int], sizes: Sequence[int]
) -> Steps[list[torch.Tensor]]:
    """This rank's parts, cut along `dims` -> the chunks of `sizes` rows."""
    out: list[torch.Tensor] = [x.new_empty(0) for x in parts]
    parts_along = [
        _padded(x.movedim(dim, 0), -(-size // axis.size))
        for x, dim, size in zip(parts, dims, sizes)
    ]
    for members in _buckets(parts_along):
        flat = torch.cat([parts_along[i].reshape(-1) for i in members])
        blocks = flat.new_empty((axis.size, 0))
        if flat.numel():
            handle = yield AllGather(flat, LINK)
            blocks = handle.wait()
        for i, block in zip(members, blocks.split([parts_along[i].numel() for i in members], 1)):
            rows, *trailing = parts_along[i].shape
            chunk = block.reshape(axis.size * rows, *trailing)[: sizes[i]]
            out[i] = chunk.movedim(0, dims[i]).contiguous()
    return out


def scatter_mean(
    axis: Axis,
    grads: Sequence[torch.Tensor],
    dims: Sequence[int],
    reduce: torch.dtype | None = None,
) -> Steps[list[torch.Tensor]]:
    """Gradients of the chunks -> the means of this rank's parts of them."""
    out: list[torch.Tensor] = [g.new_empty(0) for g in grads]
    for members in _buckets(grads):
        moved = [grads[i].movedim(dims[i], 0) for i in members]
        rows = [-(-g.shape[0] // axis.size) for g in moved]
        flat = [_padded(g, axis.size * n).reshape(axis.size, -1) for g, n in zip(moved, rows)]
        blocks = torch.cat(flat, 1)
        block = blocks[axis.rank]
        if blocks.numel():
            handle = yield ReduceScatter(blocks.to(summing(blocks.dtype, reduce)), LINK)
            block = handle.wait().div_(axis.size)
        for i, g, n, part in zip(members, moved, rows, block.split([f.shape[1] for f in flat])):
            length = max(0, min(n, g.shape[0] - axis.rank * n))
            part = part.view(n, *g.shape[1:])[:length].to(g.dtype)
            out[i] = part.movedim(0, dims[i]).clone(memory_format=torch.contiguous_format)
    return out


def mean(
    axis: Axis, grads: Sequence[torch.Tensor], reduce: torch.dtype | None = None
) -> Steps[list[torch.Tensor]]:
    """Gradients averaged over the replicas, as DDP does."""
    out: list[torch.Tensor] = list(grads)
    for members in _buckets(grads):
        flat = torch.cat([grads[i].reshape(-1) for i in members])
        handle = yield AllReduce(flat.to(summing(flat.dtype, reduce)), LINK)
        parts = handle.wait().div_(axis.size).split([grads[i].numel() for i in members])
        for i, x in zip(members, parts):
            out[i] = x.to(grads[i].dtype, copy=True).view(grads[i].shape)
    return out


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """With zero rows at the end."""
    missing = rows - x.shape[0]
    return torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) if missing else x


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Places of the tensors that travel together; their sizes are the same on all replicas."""
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        members, held = [], 0
        for i, x in enumerate(tensors):
            if x.dtype != dtype:
                continue
            if members and held + x.nbytes > BUCKET:
                yield members
                members, held = [], 0
            members.append(i)
            held += x.nbytes
        yield members
