"""What an op along the sequence reads of other ranks, as generators.

A plan says for every rank which ranges of the whole dim it takes and where it puts them; it follows
from the layout and the sizes, so all ranks know what each sends. More may be asked for than a chunk
holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from tspc.ir.layout import Layout, Span
from tspc.runtime.comm.exchange import summing
from tspc.runtime.comm.requests import AllGather, Axis, Exchange, Steps


@dataclass(frozen=True)
class Tiles:
    """A dim of lead * S * trail elements of which each rank has, for each place of `lead`, its
    chunks."""

    span: Span
    lead: int
    trail: int

    @property
    def size(self) -> int:
        """Elements of the whole dim."""
        return self.lead * self.span.length * self.trail

    @property
    def local(self) -> int:
        """Elements of a rank's part."""
        return self.lead * self.span.local * self.trail

    def of(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """(number of the tile, first element in the whole dim, how many are no pads)."""
        layout, rows, length = self.span.layout, self.span.rows, self.span.length
        for a in range(self.lead):
            for k, g in enumerate(layout.chunk_ids(rank)):
                real = max(0, min(rows, length - g * rows))
                first = (a * length + g * rows) * self.trail
                yield a * layout.chunks + k, first, real * self.trail


@dataclass(frozen=True)
class Move:
    """`count` local elements of `source` from `start` on stand at `at` on `target`."""

    source: int
    target: int
    start: int
    count: int
    at: int


@dataclass(frozen=True)
class Plan:
    """By target, the moves of each in the order of its sources; local sizes before and after."""

    moves: tuple[Move, ...]
    before: int
    after: int

    def back(self) -> Plan:
        """Every element to where it came from."""
        moves = (Move(m.target, m.source, m.at, m.count, m.start) for m in self.moves)
        return Plan(tuple(moves), self.after, self.before)


def _ranges(
    tiles: Tiles, target: int, left: int, right: int, way: str
) -> Iterator[tuple[int, int, int]]:
    """(first, end, place on the target) of the elements of the whole dim that it takes."""
    width = tiles.span.rows * tiles.trail
    for n, first, count in tiles.of(target):
        base, lo, hi = n * (width + left + right), first - left, first + width + right
        if not count:
            continue
        if way == "zeros":
            yield max(lo, 0), min(hi, tiles.size), base + max(-lo, 0)
        elif way == "mirror":
            yield tiles.size - first - count, tiles.size - first, base + width - count
        else:
            lo %= tiles.size
            head = min(count, tiles.size - lo)
            yield lo, lo + head, base
            yield 0, count - head, base + head


@lru_cache(64)
def plan(tiles: Tiles, left: int, right: int, way: str) -> Plan:
    """What all ranks send and receive."""
    layout, rows, length, trail = tiles.span.layout, tiles.span.rows, tiles.span.length, tiles.trail
    owner = {g: (r, k) for r in range(layout.ranks) for k, g in enumerate(layout.chunk_ids(r))}
    out = []
    for target in range(layout.ranks):
        moves = []
        for lo, hi, at in _ranges(tiles, target, left, right, way):
            while lo < hi:
                a, row = divmod(lo // trail, length)
                source, k = owner[row // rows]
                end = (a * length + min((row // rows + 1) * rows, length)) * trail
                count = min(hi, end) - lo
                start = (a * layout.chunks + k) * rows + row % rows
                moves.append(Move(source, target, start * trail + lo % trail, count, at))
                lo, at = lo + count, at + count
        out += sorted(moves, key=lambda m: m.source)
    more = tiles.lead * layout.chunks * (left + right)
    return Plan(tuple(out), tiles.local, tiles.local + more)


def _counts(moves: Sequence[Move], ranks: int, end: str) -> tuple[int, ...]:
    return tuple(sum(m.count for m in moves if getattr(m, end) == r) for r in range(ranks))


def moved(axis: Axis, x: torch.Tensor, dim: int, p: Plan) -> Steps[torch.Tensor]:
    """What the plan says of `dim`; elements that meet add up, zeros where none comes."""
    x = x.movedim(dim, 0)
    here = [m for m in p.moves if m.source == axis.rank == m.target]
    going = [m for m in p.moves if m.source == axis.rank != m.target]
    coming = [m for m in p.moves if m.target == axis.rank != m.source]
    out = x.new_zeros((p.after, *x.shape[1:]), dtype=summing(x.dtype))
    handle = None
    if any(m.source != m.target for m in p.moves):  # on any rank: all of them exchange
        sent = torch.cat([x[:0], *(x[m.start : m.start + m.count] for m in going)])
        counts = _counts(going, axis.size, "target"), _counts(coming, axis.size, "source")
        handle = yield Exchange(sent, "activations", *counts)
    for m in here:
        out[m.at : m.at + m.count] += x[m.start : m.start + m.count]
    if handle is not None:
        for m, part in zip(coming, handle.wait().split([m.count for m in coming])):
            out[m.at : m.at + m.count] += part
    return out.to(x.dtype).movedim(0, dim).contiguous()


def carry(
    axis: Axis, layout: Layout, x: torch.Tensor, dim: int, lead: int, after: bool
) -> Steps[torch.Tensor]:
    """Of one element per tile: the sum of those of the tiles before it, or behind it."""
    handle = yield AllGather(x.movedim(dim, 0).contiguous())
    totals = handle.wait().to(summing(x.dtype))
    totals = totals.unflatten(1, (lead, layout.chunks)).transpose(0, 1).flatten(1, 2)
    shape, ordered = totals.shape, layout.in_order(totals, 1, 1).flatten(0, 1)
    if after:
        ordered = ordered.flip(0)
    before = torch.cat([torch.zeros_like(ordered[:1]), ordered[:-1]]).cumsum(0)
    if after:
        before = before.flip(0)
    ordered = before.view(shape)
    local = torch.stack([ordered[:, g] for g in layout.chunk_ids(axis.rank)], 1).flatten(0, 1)
    return local.to(x.dtype).movedim(0, dim).contiguous()


def _by_tile(x: torch.Tensor, tiles: int) -> torch.Tensor:
    """[B, C, tiles * n] -> [B * tiles, C, n]."""
    return x if tiles == 1 else x.unflatten(2, (tiles, -1)).transpose(1, 2).flatten(0, 1)


def _side_by_side(y: torch.Tensor, tiles: int) -> torch.Tensor:
    """The inverse of `_by_tile`."""
    return y if tiles == 1 else y.unflatten(0, (-1, tiles)).transpose(1, 2).flatten(2, 3)


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dilation: int,
    groups: int,
    tiles: int,
) -> torch.Tensor:
    """Of each tile, without pads."""
    operands = (_by_tile(x, tiles), weight, bias, 1, 0, dilation, groups)
    return _side_by_side(torch.nn.functional.conv1d(*operands), tiles).contiguous()


def convolution_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    dilation: int,
    groups: int,
    tiles: int,
    wanted: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients that are wanted of x, the weight and the bias."""
    bias = [weight.shape[0]] if wanted[2] else None
    settings = ([1], [0], [dilation], False, [0], groups, wanted)
    operands = (_by_tile(g, tiles).contiguous(), _by_tile(x, tiles), weight)
    gradients = list(torch.ops.aten.convolution_backward(*operands, bias, *settings))
    if wanted[0]:
        gradients[0] = _side_by_side(gradients[0], tiles)
    return [t.contiguous() for t, w in zip(gradients, wanted) if w]
