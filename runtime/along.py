"""Rows of other ranks that an op along the sequence reads, as generators.

A plan says for every rank which ranges of the real sequence it takes and where it puts them; it
follows from the layout and the sizes, so all ranks know what each sends. The number of rows that
are asked for may be larger than a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from tspc.runtime.exchange import summing
from tspc.runtime.requests import AllGather, Axis, Exchange, Steps

from tspc.layout import Layout


@dataclass(frozen=True)
class Move:
    """`count` local rows of `source` from `start` on stand at `at` on `target`."""

    source: int
    target: int
    start: int
    count: int
    at: int


def _ranges(
    layout: Layout, target: int, left: int, right: int, way: str, rows: int, length: int
) -> Iterator[tuple[int, int, int]]:
    """(first row, end, place on the target) of the real rows that it takes."""
    for k, g in enumerate(layout.chunk_ids(target)):
        base, lo, hi = k * (rows + left + right), g * rows - left, (g + 1) * rows + right
        if way == "zeros":
            yield max(lo, 0), min(hi, length), base + max(-lo, 0)
            continue
        count = max(0, min(hi + left, length) - lo - left)  # real rows of the result
        if way == "mirror":
            yield length - g * rows - count, length - g * rows, base + rows - count
            continue
        first = lo % length
        head = min(count, length - first)
        yield first, first + head, base
        yield 0, count - head, base + head


@lru_cache(64)
def plan(
    layout: Layout, left: int, right: int, way: str, rows: int, length: int
) -> tuple[Move, ...]:
    """By target, the rows of each in the order of its sources."""
    owner = {g: (r, k) for r in range(layout.ranks) for k, g in enumerate(layout.chunk_ids(r))}
    out = []
    for target in range(layout.ranks):
        moves = []
        for lo, hi, at in _ranges(layout, target, left, right, way, rows, length):
            while lo < hi:
                g = lo // rows
                source, k = owner[g]
                count = min(hi, (g + 1) * rows) - lo
                moves.append(Move(source, target, k * rows + lo - g * rows, count, at))
                lo, at = lo + count, at + count
        out += sorted(moves, key=lambda m: m.source)
    return tuple(out)


def _counts(moves: list[Move], ranks: int, end: str) -> tuple[int, ...]:
    return tuple(sum(m.count for m in moves if getattr(m, end) == r) for r in range(ranks))


def _met(axis: Axis, moves: tuple[Move, ...]) -> tuple[list[Move], list[Move], list[Move], bool]:
    """What stays here, goes out, comes in; whether anything travels on any rank."""
    here = [m for m in moves if m.source == axis.rank == m.target]
    going = [m for m in moves if m.source == axis.rank != m.target]
    coming = [m for m in moves if m.target == axis.rank != m.source]
    return here, going, coming, any(m.source != m.target for m in moves)


def extend(
    axis: Axis,
    layout: Layout,
    x: torch.Tensor,
    left: int,
    right: int,
    way: str,
    dim: int,
    rows: int,
    length: int,
) -> Steps:
    """The chunks of `dim`, each with the rows around it."""
    x = x.movedim(dim, 0)
    moves = plan(layout, left, right, way, rows, length)
    here, going, coming, travels = _met(axis, moves)
    out = x.new_zeros((layout.chunks * (rows + left + right), *x.shape[1:]))
    handle = None
    if travels:
        sent = torch.cat([x[:0], *(x[m.start : m.start + m.count] for m in going)])
        counts = (_counts(going, axis.size, "target"), _counts(coming, axis.size, "source"))
        handle = yield Exchange(sent, "activations", *counts)
    for m in here:
        out[m.at : m.at + m.count] = x[m.start : m.start + m.count]
    if handle is not None:
        for m, part in zip(coming, handle.wait().split([m.count for m in coming])):
            out[m.at : m.at + m.count] = part
    return out.movedim(0, dim).contiguous()


def extend_backward(
    axis: Axis,
    layout: Layout,
    g: torch.Tensor,
    left: int,
    right: int,
    way: str,
    dim: int,
    rows: int,
    length: int,
) -> Steps:
    """Every row's cotangents, added up where the row lies; zero in pads."""
    g = g.movedim(dim, 0)
    moves = plan(layout, left, right, way, rows, length)
    here, going, coming, travels = _met(axis, moves)
    wide = summing(g.dtype)
    out = g.new_zeros((layout.chunks * rows, *g.shape[1:]), dtype=wide)
    handle = None
    if travels:
        sent = torch.cat([g[:0], *(g[m.at : m.at + m.count] for m in coming)])
        counts = (_counts(coming, axis.size, "source"), _counts(going, axis.size, "target"))
        handle = yield Exchange(sent, "activations", *counts)
    for m in here:
        out[m.start : m.start + m.count] += g[m.at : m.at + m.count]
    if handle is not None:
        for m, part in zip(going, handle.wait().split([m.count for m in going])):
            out[m.start : m.start + m.count] += part
    return out.to(g.dtype).movedim(0, dim).contiguous()


def carry(axis: Axis, layout: Layout, x: torch.Tensor, dim: int, after: bool) -> Steps:
    """Of one row per chunk: the sum of those of the chunks before it, or behind it."""
    handle = yield AllGather(x.movedim(dim, 0).contiguous())
    every = handle.wait().flatten(0, 1).to(summing(x.dtype))
    ids = layout.all_chunk_ids()
    mine = []
    for g in layout.chunk_ids(axis.rank):
        met = [k for k, h in enumerate(ids) if (h > g if after else h < g)]
        met.sort(key=lambda k: ids[k])
        mine.append(every[met].sum(0))
    return torch.stack(mine).to(x.dtype).movedim(0, dim).contiguous()
