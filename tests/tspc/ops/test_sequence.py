"""Ops along the sequence: a convolution that keeps the length, and what ranks ask of each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.support.ranks import AXIS, on_ranks, with_gradients
from tspc.ir.layout import Layout
from tspc.ops.sequence import SEQUENCE_CONV, sequence_conv

ops = torch.ops.tspc
Tensor = torch.Tensor
RANKS, LENGTH = 2, 8


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("left,dilation", [(3, 1), (0, 2), (6, 2), (2, 1)])
def test_a_row_reads_rows_before_and_behind(left: int, dilation: int) -> None:
    x, weight, bias = draw(2, 3, LENGTH), draw(5, 3, 4), draw(5)
    y = sequence_conv(x, weight, bias, left, dilation, 1)
    wanted = bias[:, None].expand(2, 5, LENGTH).clone()
    for i in range(LENGTH):
        for t in range(4):
            at = i - left + t * dilation
            if 0 <= at < LENGTH:
                wanted[:, :, i] += x[:, :, at] @ weight[:, :, t].T
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(SEQUENCE_CONV(x, weight, bias, left, dilation, 1), wanted)


def test_one_group_for_each_channel() -> None:
    x, weight = draw(2, 3, LENGTH), draw(3, 1, 4)
    wanted = F.conv1d(F.pad(x, (3, 0)), weight, groups=3)
    torch.testing.assert_close(sequence_conv(x, weight, None, 3, 1, 0), wanted)


def geometry(rows: int, order: str = "contiguous") -> tuple:
    return 0, 1, 1, rows, LENGTH, order, AXIS


def test_elements_before_and_behind_a_tile_and_their_gradients() -> None:
    x, left, right = torch.arange(1.0, LENGTH + 1, dtype=torch.float64), 2, 1
    padded = F.pad(x, (left, right))
    parts = x.chunk(RANKS)
    gs = [draw(7) for _ in range(RANKS)]
    got = with_gradients(
        lambda p: ops.extend(p, left, right, "zeros", *geometry(4)), [[p] for p in parts], gs
    )
    back = torch.zeros_like(padded)
    for r in range(RANKS):
        back[4 * r : 4 * r + 7] += gs[r]
    for r, (y, dx) in enumerate(got):
        assert torch.equal(y, padded[4 * r : 4 * r + 7])
        torch.testing.assert_close(dx, back[left : left + LENGTH][4 * r : 4 * r + 4])


def test_sums_of_the_tiles_before_and_their_gradients() -> None:
    layout = Layout(RANKS, "zigzag")
    sums = torch.arange(1.0, 5, dtype=torch.float64).square()
    ids = [layout.chunk_ids(r) for r in range(RANKS)]
    before, g = sums.cumsum(0) - sums, draw(4)
    behind = g.flip(0).cumsum(0).flip(0) - g
    got = with_gradients(
        lambda p: ops.carry(p, 0, 1, False, "zigzag", AXIS),
        [[sums[i]] for i in ids],
        [g[i] for i in ids],
    )
    for i, (y, dx) in zip(ids, got):
        assert torch.equal(y, before[i])
        torch.testing.assert_close(dx, behind[i])


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_of_tiles_and_its_gradients(bias: bool) -> None:
    """Two tiles that overlap by what the window reaches over."""
    x, weight = draw(2, 3, 2 * 6), draw(5, 3, 3)
    b, g = draw(5) if bias else None, draw(2, 5, 8)
    operands = [t.clone().requires_grad_() for t in (x, weight, *([b] if b is not None else []))]
    wanted = torch.cat([F.conv1d(t, *operands[1:]) for t in operands[0].split(6, 2)], 2)
    grads = torch.autograd.grad(wanted, operands, g)
    inputs = [x, weight, *([b] if b is not None else [])]

    def fn(x: Tensor, weight: Tensor, b: Tensor | None = None) -> Tensor:
        return ops.tile_conv(x, weight, b, 1, 1, 2, AXIS)

    for y, *got in with_gradients(fn, [inputs] * RANKS, [g] * RANKS):
        torch.testing.assert_close(y, wanted.detach())
        assert len(got) == len(grads)
        for d, e in zip(got, grads):
            torch.testing.assert_close(d, e)


def test_only_gradients_that_are_wanted() -> None:
    def fn(g: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        return ops.tile_conv_backward(g, x, weight, 1, 1, 1, [False, True, False], AXIS)

    ((dw,), _) = on_ranks(fn, [[draw(2, 5, 4), draw(2, 3, 6), draw(5, 3, 3)]] * 2)
    assert dw.shape == (5, 3, 3)
