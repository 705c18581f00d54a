"""K and V of the whole sequence for the queries of a rank, and their gradients back.

All rows, or, where a predicate of positions tells that the ranks need few of each other's (a
window), only those: the others are zero, and no query sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

from tspc.masks.predicate import truth
from tspc.runtime.attention.blocks import Meeting
from tspc.runtime.comm.requests import AllGather, Exchange, ReduceScatter, Steps

Tensor = torch.Tensor
Ranges = tuple[tuple[int, int, int], ...]  # (first local row, past the last, position of the first)
Needs = tuple[tuple[Ranges, ...], ...]
FEW = 0.75  # of all rows: beyond it a gather is as good


def _packed(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A buffer for both with the sequence first, [n, b, hk, dk + dv], and views of it like k and
    like v."""
    b, heads, n, width = k.shape
    both = k.new_empty((n, b, heads, width + v.shape[-1]))
    views = both.permute(1, 2, 0, 3)
    keys, values = views[..., :width], views[..., width:]
    keys.copy_(k)
    values.copy_(v)
    return both, keys, values


def gather(rank: int, m: Meeting, k: Tensor, v: Tensor) -> Steps:
    """The whole sequence of keys and values, pads dropped: one communication."""
    both, span = _packed(k, v)[0], m.keys
    layout, needs = span.layout, _needs(m)
    if needs is None:
        handle = yield AllGather(both)
        whole = layout.whole(handle.wait().flatten(0, 1), 0, span.rows, span.length)
    else:
        whole = both.new_zeros((span.length, *both.shape[1:]))
        theirs = [needs[to][rank] if to != rank else () for to in range(layout.ranks)]
        sent, counts = _cut(both, theirs)
        wanted = [needs[rank][r] if r != rank else () for r in range(layout.ranks)]
        handle = yield Exchange(sent, "activations", counts, _counts(wanted))
        _place(whole, both, needs[rank][rank])
        got = handle.wait()
        for ranges, part in zip(wanted, got.split(_counts(wanted))):
            done = 0
            for first, last, at in ranges:
                whole[at : at + last - first] = part[done : done + last - first]
                done += last - first
    whole = whole.permute(1, 2, 0, 3)
    return whole[..., : k.shape[-1]], whole[..., k.shape[-1] :]


def scatter(rank: int, m: Meeting, dk: Tensor, dv: Tensor) -> Steps:
    """The transpose of `gather`: gradients of whole K and V, summed -> those of the local rows."""
    both, span = _packed(dk, dv)[0], m.keys
    layout, needs = span.layout, _needs(m)
    if needs is None:
        blocks = layout.blocks(both, 0, span.rows)
        handle = yield ReduceScatter(blocks.unflatten(0, (layout.ranks, -1)))
        local = handle.wait()
    else:
        theirs = [needs[rank][r] if r != rank else () for r in range(layout.ranks)]
        parts = [both[at : at + b - a] for ranges in theirs for a, b, at in ranges]
        sent = torch.cat(parts) if parts else both[:0]
        ranges_here = [needs[to][rank] if to != rank else () for to in range(layout.ranks)]
        handle = yield Exchange(sent, "activations", _counts(theirs), _counts(ranges_here))
        local = both.new_zeros((layout.chunks * span.rows, *both.shape[1:]))
        for a, b, at in needs[rank][rank]:
            local[a:b] += both[at : at + b - a]
        got, done = handle.wait(), 0
        for ranges in ranges_here:
            for a, b, _ in ranges:
                local[a:b] += got[done : done + b - a]
                done += b - a
    local = local.permute(1, 2, 0, 3)
    return local[..., : dk.shape[-1]], local[..., dk.shape[-1] :]


def _place(whole: Tensor, local: Tensor, ranges: Ranges) -> None:
    for a, b, at in ranges:
        whole[at : at + b - a] = local[a:b]


def _cut(local: Tensor, ranges: list[Ranges]) -> tuple[Tensor, tuple[int, ...]]:
    """The rows of every range, one after the other, and how many for each rank."""
    parts = [local[a:b] for rank in ranges for a, b, _ in rank]
    return torch.cat(parts) if parts else local[:0], _counts(ranges)


def _counts(ranges: list[Ranges]) -> tuple[int, ...]:
    return tuple(sum(b - a for a, b, _ in rank) for rank in ranges)


def _needs(m: Meeting) -> Needs | None:
    """None where nothing but sizes tells, or queries and keys are of two sequences: all go to
    all."""
    if not m.spec.predicate or m.queries != m.keys:
        return None
    return needed(replace(m, spec=replace(m.spec, scale=1.0, dropout=0.0, score="")))


@lru_cache(maxsize=256)
def needed(m: Meeting) -> Needs | None:
    """By receiver and sender: the rows of the sender that some query of the receiver may see.

    None: all go to all. Positions and sizes alone tell, so all ranks find the same.
    """
    if not m.spec.predicate or m.spec.fill:
        return None
    layout = m.keys.layout
    out = tuple(
        tuple(
            tuple(r for i in range(layout.chunks) if (r := _rows(m, to, source, i)))
            for source in range(layout.ranks)
        )
        for to in range(layout.ranks)
    )
    sent = sum(
        b - a
        for to, row in enumerate(out)
        for source, ranges in enumerate(row)
        if to != source
        for a, b, _ in ranges
    )
    return out if sent <= FEW * m.keys.length * (layout.ranks - 1) else None


def _rows(m: Meeting, to: int, source: int, chunk: int) -> tuple[int, int, int] | None:
    """The range of a chunk of the sender; to itself all that is no pad."""
    layout, c, last = m.keys.layout, m.keys.rows, m.keys.length - 1
    start = layout.chunk_ids(source)[chunk] * c
    end = min(start + c, m.keys.length)
    if start >= end:
        return None
    if to == source:
        return chunk * c, chunk * c + end - start, start
    lows, highs = [], []
    for g in layout.chunk_ids(to):
        queries = min(g * c, last), min(g * c + c - 1, last)

        def empty(a: int, b: int, queries: tuple[int, int] = queries) -> bool:
            """No query sees one of the keys [a, b)."""
            return any(truth(t, queries, (a, b - 1), m.spec.sizes) is False for t in m.spec.texts)

        if empty(start, end):
            continue
        lows.append(_last(start, end - 1, lambda x, empty=empty: x == start or empty(start, x)))
        highs.append(
            -_last(-end, -lows[-1] - 1, lambda x, empty=empty: x == -end or empty(-x, end))
        )
    if not lows:
        return None
    low, high = min(lows), max(highs)
    return chunk * c + low - start, chunk * c + high - start, low


def _last(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The greatest x of [low, high] for which a property holds that holds for all up to one."""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
