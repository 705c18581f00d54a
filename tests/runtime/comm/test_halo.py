"""What ranks tell each other along a sequence: elements beside a chunk, sums of what is before, and
convolutions of tiles."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tspc.ir.layout import Layout, Span
from tspc.runtime.comm import halo as along
from tspc.runtime.comm.drivers import lockstep, record
from tspc.runtime.comm.requests import Axis


def cut(tiles: along.Tiles, rank: int, x: Tensor) -> Tensor:
    """A rank's part of [lead * length * trail, n], with numbers in the pads."""
    width = tiles.span.rows * tiles.trail
    parts = [(first, count) for _, first, count in tiles.of(rank)]
    pads = (x.new_full((width - count, x.shape[1]), 99.0) for _, count in parts)
    return torch.cat([t for (i, n), p in zip(parts, pads) for t in (x[i : i + n], p)])


LAYOUTS = [
    (Layout(ranks, order), lead, trail, length)
    for ranks in (1, 2, 3, 4)
    for order in ("contiguous", "zigzag")
    for lead, trail in ((1, 1), (3, 2))
    for length in (1, 5, 12, 17)
]


@pytest.mark.parametrize("layout,lead,trail,length", LAYOUTS)
def test_exchanged_rows(layout: Layout, lead: int, trail: int, length: int) -> None:
    """Against the whole dim; the backward is the adjoint."""
    rows = layout.chunk_rows(length)
    tiles, ranks = along.Tiles(Span(layout, rows, length), lead, trail), layout.ranks
    draw = torch.Generator().manual_seed(length)
    x = torch.randn(tiles.size, 1, generator=draw, dtype=torch.float64)
    width, axes = rows * trail, [Axis("tsp", ranks, r) for r in range(ranks)]
    for left, right, way in ((3, 0, "zeros"), (1, 30, "zeros"), (-2, 2, "zeros"), (4, -4, "wrap")):
        p = along.plan(tiles, left, right, way)
        mine = [cut(tiles, r, x) for r in range(ranks)]
        got = lockstep([along.moved(a, m, 0, p) for a, m in zip(axes, mine)])
        v = [torch.randn(g.shape, generator=draw, dtype=g.dtype) for g in got]
        back = lockstep([along.moved(a, t, 0, p.back()) for a, t in zip(axes, v)])
        for r, g in enumerate(got):
            for n, first, count in (t for t in tiles.of(r) if t[2]):
                places = torch.arange(first - left, first + count + right)
                inside = (places >= 0) & (places < tiles.size)
                want = x[places % tiles.size]
                want = want if way == "wrap" else torch.where(inside[:, None], want, 0.0)
                at = n * (width + left + right)
                torch.testing.assert_close(g[at : at + len(places)], want, rtol=0, atol=0)
        forth = sum((g * t).sum() for g, t in zip(got, v))
        torch.testing.assert_close(sum((m * b).sum() for m, b in zip(mine, back)), forth)


def test_sums_before_and_behind() -> None:
    for ranks, order, lead in itertools.product((1, 2, 3), ("contiguous", "zigzag"), (1, 3)):
        layout = Layout(ranks, order)
        x = torch.arange(lead * ranks * layout.chunks, dtype=torch.float64).square()
        by_rank = x.view(lead, -1)[:, layout.all_chunk_ids()].view(lead, ranks, -1)
        axes = [Axis("tsp", ranks, r) for r in range(ranks)]
        for after in (False, True):
            want = (x.flip(0).cumsum(0).flip(0) if after else x.cumsum(0)) - x
            want = want.view(lead, -1)[:, layout.all_chunk_ids()].view(lead, ranks, -1)
            steps = [
                along.carry(a, layout, by_rank[:, a.rank].flatten(), 0, lead, after) for a in axes
            ]
            for r, got in enumerate(lockstep(steps)):
                torch.testing.assert_close(got, want[:, r].flatten())


def test_what_a_rank_has_of_a_dim() -> None:
    tiles = along.Tiles(Span(Layout(2, "zigzag"), 2, 7), 2, 3)
    assert (tiles.size, tiles.local) == (42, 24)
    assert list(tiles.of(0)) == [(0, 0, 6), (1, 18, 3), (2, 21, 6), (3, 39, 3)]


def test_a_plan_backwards_brings_each_element_home() -> None:
    p = along.plan(along.Tiles(Span(Layout(2), 3, 5), 1, 1), 1, 1, "zeros")
    assert (p.before, p.after) == (3, 5) and (p.back().before, p.back().after) == (5, 3)
    assert p.back().back() == p
    assert along.Move(0, 1, 2, 1, 0) in p.moves


def test_ranks_that_need_nothing_send_nothing() -> None:
    layout = Layout(2)
    p = along.plan(along.Tiles(Span(layout, 3, 6), 1, 1), 0, 0, "zeros")
    x = torch.arange(6.0)
    with record() as sent:
        got = lockstep([along.moved(Axis("t", 2, r), x[3 * r : 3 * r + 3], 0, p) for r in (0, 1)])
    assert not sent and torch.equal(torch.cat(got), x)


def test_rows_back_to_front() -> None:
    """Each tile gets what stands there when the dim is turned round, itself back to front."""
    tiles = along.Tiles(Span(Layout(2), 3, 5), 1, 1)
    p, x = along.plan(tiles, 0, 0, "mirror"), torch.arange(5.0)
    parts = [cut(tiles, r, x[:, None])[:, 0] for r in range(2)]
    got = lockstep([along.moved(Axis("t", 2, r), parts[r], 0, p) for r in range(2)])
    assert got[0].flip(0).tolist() == [4.0, 3.0, 2.0] and got[1].flip(0)[:2].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("tiles", [1, 2])
def test_a_convolution_of_each_tile(tiles: int) -> None:
    x = torch.randn(2, 3, 6 * tiles, dtype=torch.float64)
    weight, bias = torch.randn(4, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    operands = [t.clone().requires_grad_() for t in (x, weight, bias)]
    parts = [F.conv1d(t, *operands[1:]) for t in operands[0].split(6, 2)]
    wanted = torch.cat(parts, 2)
    torch.testing.assert_close(along.convolution(x, weight, bias, 1, 1, tiles), wanted)
    g = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, operands, g)
    got = along.convolution_backward(g, x, weight, 1, 1, tiles, [True, True, True])
    for a, b in zip(got, grads, strict=True):
        torch.testing.assert_close(a, b)
    (only,) = along.convolution_backward(g, x, weight, 1, 1, tiles, [False, True, False])
    torch.testing.assert_close(only, grads[1])
