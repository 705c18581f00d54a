"""Stored chunks of a weight <-> the equal shards of a fold: one all-to-all of equal blocks, none
where the maps agree."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from tspc.ir.shard import ShardMap
from tspc.runtime.comm.requests import AllToAll, Axis, Steps
from tspc.seams.tensors import FakeTensor


def index(rows: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """On its device, brought there once."""
    if isinstance(like, FakeTensor):
        return torch.tensor(rows, device=like.device)
    return _index(tuple(rows), like.device)


@lru_cache(maxsize=1024)
def _index(rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(rows, device=device)


def _fit(m: ShardMap, rank: int, local: torch.Tensor, size: int) -> torch.Tensor:
    """A chunk that is the shard but for its pads."""
    rows, dim = m.rows[rank], m.dim
    if local.shape[dim] == len(rows):
        return local.view_as(local)
    if local.shape[dim] == 0:
        shape = list(local.shape)
        shape[dim] = len(rows)
        return local.new_zeros(shape)
    start = min(rank * -(-size // len(m.rows)), size)
    at = index([max(r - start, 0) for r in rows], local)
    keep = index([int(r >= 0) for r in rows], local) > 0
    shape = [1] * local.dim()
    shape[dim] = len(rows)
    return torch.where(keep.view(shape), local.index_select(dim, at), 0)


def fits(m: ShardMap, local: Sequence[int], whole: Sequence[int]) -> bool:
    """A chunk of this shape is the shard as it is: nothing to exchange, either way."""
    return local[m.dim] == m.length and m.is_chunked(whole[m.dim])


@lru_cache(maxsize=4096)
def _blocks(
    m: ShardMap, size: int, gradient: bool
) -> tuple[int, dict[tuple[int, int], tuple[list[int], list[int]]]]:
    """(rows of a block, (owner, shard) -> (rows of the owner's chunk, places in the shard))."""
    chunk = -(-size // len(m.rows))
    out: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for j, (rows, real) in enumerate(zip(m.rows, m.real)):
        for i, r in enumerate(rows):
            if r >= 0 and (real[i] or not gradient):
                source, place = out.setdefault((r // chunk, j), ([], []))
                source.append(r - (r // chunk) * chunk)
                place.append(i)
    return max(len(s) for s, _ in out.values()), out


def repack(axis: Axis, m: ShardMap, local: torch.Tensor, size: int) -> Steps[torch.Tensor]:
    """This rank's chunk of a dim of `size` rows (torch's chunks) -> its shard of the fold."""
    if m.is_chunked(size):
        return _fit(m, axis.rank, local, size)
    count, blocks = _blocks(m, size, False)
    x = local.movedim(m.dim, 0)
    send = x.new_zeros((axis.size, count, *x.shape[1:]))
    for j in range(axis.size):
        source, _ = blocks.get((axis.rank, j), ([], []))
        if source:
            send[j, : len(source)] = x[index(source, x)]
    handle = yield AllToAll(send, "weights")
    got = handle.wait()
    shard = x.new_zeros((m.length, *x.shape[1:]))
    for owner in range(axis.size):
        _, place = blocks.get((owner, axis.rank), ([], []))
        if place:
            shard[index(place, x)] = got[owner, : len(place)]
    return shard.movedim(0, m.dim).contiguous()


def repack_backward(
    axis: Axis, m: ShardMap, g: torch.Tensor, size: int, rows: int
) -> Steps[torch.Tensor]:
    """Gradient of the shard -> of this rank's chunk of `rows` rows: the transposed map,
    duplicates add, pads go."""
    if m.is_chunked(size):
        return g.narrow(m.dim, 0, rows).contiguous()
    count, blocks = _blocks(m, size, True)
    x = g.movedim(m.dim, 0)
    send = x.new_zeros((axis.size, count, *x.shape[1:]))
    for owner in range(axis.size):
        _, place = blocks.get((owner, axis.rank), ([], []))
        if place:
            send[owner, : len(place)] = x[index(place, x)]
    handle = yield AllToAll(send, "weights")
    got = handle.wait()
    chunk = x.new_zeros((rows, *x.shape[1:]))
    for j in range(axis.size):
        source, _ = blocks.get((axis.rank, j), ([], []))
        if source:
            chunk.index_add_(0, index(source, x), got[j, : len(source)])
    return chunk.movedim(0, m.dim).contiguous()
