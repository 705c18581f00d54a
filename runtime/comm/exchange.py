"""Conversions between placements, embedding and weight gathers, as generators (docs/design.md,
"Types on the axis").

A sequence dim is (dim, lead): the dim is lead * S * trail.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tspc.ir.layout import Span
from tspc.runtime.comm.requests import (
    AllGather,
    AllReduce,
    Axis,
    ReduceScatter,
    Shift,
    Steps,
)


def _split(x: torch.Tensor, dim: int, lead: int, count: int) -> torch.Tensor:
    """[..., lead * count * trail, ...] -> [pre * lead, count, rest]: the sequence as dim 1."""
    pre = 1
    for n in x.shape[:dim]:
        pre *= n
    return x.reshape(pre * lead, count, -1)


def _shape(x: torch.Tensor, dim: int, before: int, after: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] = shape[dim] // before * after
    return shape


def take(span: Span, rank: int, x: torch.Tensor, dim: int, lead: int) -> torch.Tensor:
    """The rows of `rank`; pads repeat the last real row."""
    at = span.layout.positions(rank, span.rows, span.length, x.device)
    local = _split(x, dim, lead, span.length).index_select(1, at)
    return local.reshape(_shape(x, dim, span.length, span.local))


def clear(span: Span, rank: int, x: torch.Tensor, dim: int, lead: int) -> torch.Tensor:
    """Zero in the pads."""
    if span.layout.ranks * span.local == span.length:
        return x.clone(memory_format=torch.contiguous_format)
    valid = span.layout.valid(rank, span.rows, span.length, x.device)
    parts = _split(x, dim, lead, span.local)
    return torch.where(valid[None, :, None], parts, 0).reshape(x.shape).contiguous()


def join(blocks: torch.Tensor, dim: int, lead: int) -> torch.Tensor:
    """[D, *local] -> the ranks' rows end to end along the sequence."""
    ranks, local = blocks.shape[0], blocks[0]
    parts = blocks.reshape(ranks, *local.shape[:dim], lead, -1, *local.shape[dim + 1 :])
    shape = list(local.shape)
    shape[dim] *= ranks
    return parts.movedim(0, dim + 1).reshape(shape)


def part(x: torch.Tensor, ranks: int, dim: int, lead: int) -> torch.Tensor:
    """The inverse of `join`: -> [D, *local]."""
    shape = list(x.shape)
    parts = x.reshape(*shape[:dim], lead, ranks, -1, *shape[dim + 1 :])
    shape[dim] //= ranks
    return parts.movedim(dim + 1, 0).reshape(ranks, *shape)


def whole(span: Span, x: torch.Tensor, dim: int, lead: int, link: str = "activations") -> Steps:
    """S -> R: gather, undo the order, drop the pads."""
    handle = yield AllGather(x, link)
    joined = join(handle.wait(), dim, lead)
    count = span.layout.ranks * span.local
    parts = span.layout.whole(_split(joined, dim, lead, count), 1, span.rows, span.length)
    return parts.reshape(_shape(joined, dim, count, span.length)).contiguous()


def summing(dtype: torch.dtype, reduce: torch.dtype | None = None) -> torch.dtype:
    """The type in which values of a type add up over the ranks."""
    wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    return wide if reduce is None else reduce


def all_reduce(axis: Axis, x: torch.Tensor) -> Steps[torch.Tensor]:
    """P -> R."""
    handle = yield AllReduce(x.to(summing(x.dtype)))
    return handle.wait().to(x.dtype)


def bucket_all_reduce(
    axis: Axis, xs: Sequence[torch.Tensor], reduce: torch.dtype | None = None
) -> Steps[list[torch.Tensor]]:
    """The sum of each tensor over the ranks, one communication per dtype."""
    out = list(xs)
    for dtype in dict.fromkeys(x.dtype for x in xs):
        members = [i for i, x in enumerate(xs) if x.dtype == dtype]
        flat = torch.cat([xs[i].reshape(-1) for i in members])
        handle = yield AllReduce(flat.to(summing(dtype, reduce)))
        parts = handle.wait().split([xs[i].numel() for i in members])
        for i, p in zip(members, parts):
            out[i] = p.to(dtype, copy=True).view(xs[i].shape)
    return out


def gather_weight(axis: Axis, shard: torch.Tensor, dim: int, size: int) -> Steps[torch.Tensor]:
    """Equal shards along `dim`, padded at the end -> the whole weight."""
    handle = yield AllGather(shard.movedim(dim, 0).contiguous(), "weights")
    blocks = handle.wait()
    return blocks.flatten(0, 1)[:size].movedim(0, dim).contiguous()


def gather_weight_backward(
    axis: Axis,
    g: torch.Tensor,
    dim: int,
    units: int,
    partial: bool,
    dtype: torch.dtype,
    reduce: torch.dtype | None,
) -> Steps[torch.Tensor]:
    """The gradient of this rank's shard, in its `dtype`; partial: the ranks' gradients add up."""
    g = g.movedim(dim, 0)
    missing = axis.size * units - g.shape[0]
    if missing:
        g = torch.cat([g, g.new_zeros((missing, *g.shape[1:]))])
    blocks = g.reshape(axis.size, units, *g.shape[1:]).contiguous()
    if partial:
        handle = yield ReduceScatter(blocks.to(summing(g.dtype, reduce)), "weights")
        block = handle.wait()
    else:
        block = blocks[axis.rank].clone()
    return block.to(dtype).movedim(0, dim).contiguous()


def embed(
    axis: Axis, span: Span, shard: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype
) -> Steps:
    """Look up rows of a table cut along its first dim, cast: the result of each rank's tokens goes
    round, each rank fills in the rows that it owns; it comes home last."""
    handle = None
    width = shard.shape[1]
    for turn in range(axis.size):
        target = (axis.rank - 1 - turn) % axis.size
        local = take(span, target, ids, ids.dim() - 1, 1)
        owned, index = _owned(local, axis.rank, shard.shape[0])
        looked_up = shard.index_select(0, index).to(dtype)
        others = handle.wait().view(-1, width) if handle else 0.0
        rows_so_far = torch.where(owned, looked_up, others).view(*local.shape, width)
        if turn + 1 == axis.size:
            return rows_so_far
        handle = yield Shift(rows_so_far)


def _owned(ids: torch.Tensor, rank: int, units: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([n, 1]: which of the flat ids lie in this rank's rows, [n]: the row of each, of others any).

    Of one size whatever the ids are: the host waits for none of them.
    """
    index = ids.reshape(-1) - rank * units
    owned = (index >= 0) & (index < units)
    return owned.unsqueeze(-1), index.clamp(0, units - 1)


def embed_backward(
    axis: Axis,
    span: Span,
    g: torch.Tensor,
    ids: torch.Tensor,
    units: int,
    padding: int,
    scaled: bool,
) -> Steps:
    """The gradient of this rank's rows, in fp32 or wider: every rank's cotangents come by in
    turn.

    padding: the row without a gradient, -1 for none. scaled: each row's is divided by how often it
    is taken.
    """
    wide = torch.promote_types(g.dtype, torch.float32)
    total = g.new_zeros((units, g.shape[-1]), dtype=wide)
    for turn in range(axis.size):
        handle = (yield Shift(g)) if turn + 1 < axis.size else None
        source = (axis.rank - turn) % axis.size
        local = take(span, source, ids, ids.dim() - 1, 1)
        owned, index = _owned(local, axis.rank, units)
        total.index_add_(0, index, torch.where(owned, g.reshape(-1, g.shape[-1]).to(wide), 0.0))
        g = g if handle is None else handle.wait()
    if scaled:
        owned, index = _owned(ids, axis.rank, units)
        taken = index.new_zeros((units, 1)).index_add_(0, index, owned.to(index.dtype))
        total /= taken.clamp(min=1)
    if 0 <= padding - axis.rank * units < units:
        total[padding - axis.rank * units] = 0
    return total
