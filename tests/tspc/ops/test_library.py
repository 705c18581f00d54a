"""tspc's ops on ranks against plain torch: values, gradients, and fakes of the same shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.fx.experimental.proxy_tensor import make_fx

import tspc
from tests.support.ranks import AXIS, on_ranks, with_gradients
from tspc.ir.layout import Layout
from tspc.ir.spec import AttentionSpec
from tspc.ops.library import local_rows, pick, resized
from tspc.seams.tensors import FakeTensorMode

ops = torch.ops.tspc
Tensor = torch.Tensor
RANKS, LENGTH = 3, 7
LAYOUTS = [Layout(RANKS, order) for order in ("contiguous", "zigzag")]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def geometry(layout: Layout, dim: int = 1, lead: int = 1, trail: int = 1) -> tuple[Any, ...]:
    return dim, lead, trail, layout.chunk_rows(LENGTH), LENGTH, layout.order, AXIS


def cut(layout: Layout, x: Tensor) -> list[Tensor]:
    """The rows of each rank along dim 1, pads as `local` makes them."""
    rows = int(layout.chunk_rows(LENGTH))
    return [x[:, layout.positions(r, rows, LENGTH)] for r in range(RANKS)]


def real(layout: Layout, r: int) -> Tensor:
    return layout.valid(r, int(layout.chunk_rows(LENGTH)), LENGTH)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_become_whole_and_gradients_rows(layout: Layout) -> None:
    x, g = draw(2, LENGTH, 3), draw(2, LENGTH, 3)
    parts = cut(layout, x)
    got = with_gradients(
        lambda p: ops.whole(p, *geometry(layout)), [[p] for p in parts], [g] * RANKS
    )
    for r, (y, dx) in enumerate(got):
        assert torch.equal(y, x)
        assert torch.equal(dx[:, real(layout, r)], cut(layout, g)[r][:, real(layout, r)])
        assert not dx[:, ~real(layout, r)].any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_whole_becomes_rows_and_gradients_whole(layout: Layout) -> None:
    x, g = draw(2, LENGTH, 3), draw(2, LENGTH, 3)
    got = with_gradients(lambda p: ops.local(p, *geometry(layout)), [[x]] * RANKS, cut(layout, g))
    for r, (y, dx) in enumerate(got):
        assert torch.equal(y, cut(layout, x)[r]) and torch.equal(dx, g)


def test_pads_are_cleared_also_of_cotangents() -> None:
    layout = LAYOUTS[1]
    parts = cut(layout, draw(2, LENGTH, 3))
    got = with_gradients(
        lambda p: ops.clear_pads(p, *geometry(layout)), [[p] for p in parts], parts
    )
    for r, (y, dx) in enumerate(got):
        wanted = torch.where(real(layout, r)[None, :, None], parts[r], 0.0)
        assert torch.equal(y, wanted) and torch.equal(dx, wanted)


def test_sums_over_ranks() -> None:
    xs, gs = [draw(2, 3) for _ in range(RANKS)], [draw(2, 3) for _ in range(RANKS)]
    total, back = sum(xs), sum(gs)
    for r, (y, dx) in enumerate(
        with_gradients(lambda x: ops.all_reduce(x, AXIS), [[x] for x in xs], gs)
    ):
        torch.testing.assert_close(y, total)
        assert torch.equal(dx, gs[r])
    for r, (y, dx) in enumerate(
        with_gradients(lambda x: ops.vary([x], None, AXIS)[0], [[x] for x in xs], gs)
    ):
        assert torch.equal(y, xs[r])
        torch.testing.assert_close(dx, back)


def test_what_no_result_hangs_on_has_no_gradient() -> None:
    def fn(x: Tensor, y: Tensor, g: Tensor) -> list[Tensor]:
        x, y = (t.detach().requires_grad_() for t in (x, y))
        a, _ = ops.vary([x, y], None, AXIS)
        dx, dy = torch.autograd.grad(a, [x, y], g, allow_unused=True)
        assert dy is None
        return [dx]

    gs = [draw(2) for _ in range(2)]
    for (dx,) in on_ranks(fn, [[draw(2), draw(2), g] for g in gs]):
        torch.testing.assert_close(dx, sum(gs))


@pytest.mark.parametrize("partial", [False, True])
def test_a_gathered_weight(partial: bool) -> None:
    weight, size, units = draw(2, 7), 7, 3
    shards = torch.cat([weight, draw(2, 2)], 1).split(units, 1)
    gs = [draw(2, size) for _ in range(RANKS)]
    gs = gs if partial else gs[:1] * RANKS
    got = with_gradients(
        lambda s: ops.gather_weight(s, 1, size, partial, torch.float64, None, AXIS),
        [[s] for s in shards],
        gs,
    )
    wanted = sum(gs) if partial else gs[0]
    padded = torch.cat([torch.as_tensor(wanted), torch.zeros(2, 2)], 1).split(units, 1)
    for r, (y, ds) in enumerate(got):
        assert torch.equal(y, weight) and y.is_contiguous()
        torch.testing.assert_close(ds, padded[r])


@pytest.mark.parametrize("padding,scaled", [(-1, False), (4, False), (4, True)])
def test_looked_up_rows(padding: int, scaled: bool) -> None:
    layout, units = LAYOUTS[0], 4
    table = draw(RANKS * units, 5).requires_grad_()
    ids = torch.randint(0, 11, (2, LENGTH))
    ids[0, :4] = 4
    wanted = torch.nn.functional.embedding(
        ids, table, None if padding < 0 else padding, scale_grad_by_freq=scaled
    )
    g = draw(2, LENGTH, 5)
    wanted.backward(g)
    parts = [
        torch.where(real(layout, r)[None, :, None], p, 0.0) for r, p in enumerate(cut(layout, g))
    ]
    rows = layout.chunk_rows(LENGTH)
    got = with_gradients(
        lambda s, i: ops.embed(
            s, i, padding, scaled, torch.float64, rows, LENGTH, "contiguous", AXIS
        ),
        [[s, ids] for s in table.detach().split(units)],
        parts,
    )
    assert table.grad is not None
    for r, (y, ds) in enumerate(got):
        assert torch.equal(y, cut(layout, wanted.detach())[r])
        torch.testing.assert_close(ds, table.grad.split(units)[r])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_attention_and_its_gradients(layout: Layout, causal: bool) -> None:
    q, k, v, g = (draw(2, 4, LENGTH, 6) for _ in range(4))
    operands = [x.requires_grad_() for x in (q, k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*operands, is_causal=causal)
    grads = torch.autograd.grad(wanted, operands, g)
    spec, rows = AttentionSpec(causal=causal), int(layout.chunk_rows(LENGTH))
    at = [layout.positions(r, rows, LENGTH) for r in range(RANKS)]
    others = (*spec.all[:-1], [], [rows] * 2, [LENGTH] * 2, [layout.order] * 2, AXIS)
    got = with_gradients(
        lambda *x: ops.attention(*x, None, None, None, *others)[0],
        [[x.detach()[:, :, i] for x in (q, k, v)] for i in at],
        [torch.where(real(layout, r)[:, None], g[:, :, i], 0.0) for r, i in enumerate(at)],
    )
    for r, (out, *dqkv) in enumerate(got):
        rows_here = real(layout, r)
        torch.testing.assert_close(out[:, :, rows_here], wanted.detach()[:, :, at[r][rows_here]])
        for d, whole in zip(dqkv, grads):
            torch.testing.assert_close(d[:, :, rows_here], whole[:, :, at[r][rows_here]])


def test_an_added_mask_has_a_gradient_where_it_wants_one() -> None:
    layout = Layout(2)
    q, k, v, mask = draw(1, 2, 4, 6), draw(1, 2, 4, 6), draw(1, 2, 4, 6), draw(1, 1, 4, 4)
    operands = [x.requires_grad_() for x in (q, k, v, mask)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*operands[:3], operands[3])
    grads = torch.autograd.grad(wanted.sum(), operands)
    others = (*AttentionSpec().all[:-1], [], [2, 2], [4, 4], [layout.order] * 2, AXIS)
    rows = [slice(0, 2), slice(2, 4)]
    got = with_gradients(
        lambda *x: ops.attention(*x, None, None, *others)[0],
        [[x.detach()[:, :, at] for x in operands] for at in rows],
        [torch.ones(1, 2, 2, 6, dtype=torch.float64)] * 2,
    )
    for at, (_, *gradients) in zip(rows, got):
        for d, whole in zip(gradients, grads):
            torch.testing.assert_close(d, whole[:, :, at])


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))).square().mean()


@pytest.mark.parametrize("schedule", ["ring", "stationary"])
def test_a_fold_and_its_gradients(schedule: str) -> None:
    torch.manual_seed(0)
    options = {"schedule": schedule}
    proof = tspc.verify(Mlp().double(), (draw(2, LENGTH, 6),), {}, RANKS, options, 1e-12)
    assert [len(g.rewritten.folds) for g in proof.graphs] == [1]


def test_a_weight_read_outside_of_a_fold_has_the_shapes_of_its_shard() -> None:
    with FakeTensorMode():
        for dim, size in ((0, 7), (1, 9), (-1, 0)):
            local = torch.empty(3, 4, requires_grad=True)
            y = ops.whole_weight(local, dim, size, False, AXIS)
            assert tuple(y.shape) == {0: (7, 4), 1: (3, 9), -1: (3, 4)}[dim]
            y.sum().backward()
            assert local.grad is not None and local.grad.shape == local.shape


def test_logits_of_labels_and_zero_beyond_the_shard() -> None:
    logits, labels = draw(2, 5), torch.tensor([6, 1])
    assert torch.equal(pick(logits, labels - 1), logits[[0, 1], [4, 0]] * torch.tensor([0.0, 1.0]))
    shifted = pick(logits, labels, torch.tensor(3))
    assert shifted.tolist() == [logits[0, 3].item(), 0.0]
    assert torch.equal(ops.pick(logits, torch.tensor([2, 3])), logits[[0, 1], [2, 3]])


def test_sizes_of_a_rank() -> None:
    assert local_rows(4, "contiguous") == 4 and local_rows(4, "zigzag") == 8
    x = torch.empty(2, 3, 4, dtype=torch.int32)
    assert (resized(x, 1, 7).shape, resized(x, 1, 7).dtype) == ((2, 7, 4), torch.int32)


def test_an_index_that_is_checked_is_as_it_was() -> None:
    with FakeTensorMode():
        index = torch.empty(3, 2, dtype=torch.long)
        got = ops.in_range(index, 5, "here")
        assert (got.shape, got.dtype) == (index.shape, index.dtype)
    gm = make_fx(lambda i: ops.in_range(i, 5, "here"), tracing_mode="fake")(torch.zeros(2).long())
    assert "in_range" in gm.code
