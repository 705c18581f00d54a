"""Conversions between placements in lockstep against whole tensors; ranges of a rank."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tspc.ir.layout import Layout, Span
from tspc.runtime.comm import exchange
from tspc.runtime.comm.drivers import lockstep, record
from tspc.runtime.comm.requests import Axis

RANKS, LENGTH, LEAD = 3, 7, 2
SPANS = [
    Span(Layout(RANKS, order), int(Layout(RANKS, order).chunk_rows(LENGTH)), LENGTH)
    for order in ("contiguous", "zigzag")
]
AXES = [Axis("t", RANKS, r) for r in range(RANKS)]
WHOLE = torch.randn(2, LEAD * LENGTH * 3, 4, dtype=torch.float64)


def rows(span: Span, rank: int) -> torch.Tensor:
    """[2, lead, local, 3, 4]: by positions."""
    at = span.layout.positions(rank, span.rows, span.length)
    return WHOLE.view(2, LEAD, LENGTH, 3, 4)[:, :, at]


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_rows_of_a_rank_and_back(span: Span) -> None:
    local = [exchange.take(span, r, WHOLE, 1, LEAD) for r in range(RANKS)]
    for r, x in enumerate(local):
        assert torch.equal(x.view(2, LEAD, span.local, 3, 4), rows(span, r))
    for x in lockstep([exchange.whole(span, x, 1, LEAD) for x in local]):
        assert torch.equal(x, WHOLE) and x.is_contiguous()


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_pads_are_zero(span: Span) -> None:
    for r in range(RANKS):
        x = exchange.clear(span, r, exchange.take(span, r, WHOLE, 1, LEAD), 1, LEAD)
        valid = span.layout.valid(r, span.rows, span.length)
        parts = x.view(2, LEAD, span.local, 3, 4)
        assert torch.equal(parts[:, :, valid], rows(span, r)[:, :, valid])
        assert not parts[:, :, ~valid].any()
    even, x = Span(Layout(2), 2, 4), torch.ones(4)
    assert exchange.clear(even, 0, x[:2], 0, 1).data_ptr() != x.data_ptr()


def test_joined_rows_and_parts_of_them() -> None:
    blocks = torch.randn(RANKS, 2, LEAD * 5, 3)
    joined = exchange.join(blocks, 1, LEAD)
    wanted = torch.cat(list(blocks.view(RANKS, 2, LEAD, 5, 3)), 2).reshape(2, -1, 3)
    assert torch.equal(joined, wanted) and torch.equal(
        exchange.part(joined, RANKS, 1, LEAD), blocks
    )


def test_the_type_in_which_values_add_up() -> None:
    s = exchange.summing
    assert s(torch.bfloat16) == torch.float32 and s(torch.float64) == torch.float64
    assert s(torch.int64) == torch.int64 and s(torch.float64, torch.bfloat16) == torch.bfloat16


def test_sums_in_fp32_or_wider() -> None:
    """2048 + 1 is lost in half precision."""
    xs = [torch.tensor([v], dtype=torch.float16) for v in (2048.0, 1.0, 1.0)]
    for x in lockstep([exchange.all_reduce(a, x) for a, x in zip(AXES, xs)]):
        assert x.dtype == torch.float16 and x.item() == 2050


def test_tensors_of_one_type_are_summed_together() -> None:
    xs = [[torch.ones(2, 3) * r, torch.ones(4).double(), torch.ones(1) * r] for r in range(RANKS)]
    with record() as sent:
        got = lockstep([exchange.bucket_all_reduce(a, x) for a, x in zip(AXES, xs)])
    assert [s.shape for s in sent] == [(7,), (4,)]
    for x in got:
        assert torch.equal(x[0], torch.full((2, 3), 3.0)) and x[1].tolist() == [3.0] * 4
        assert x[2].item() == 3 and x[1].dtype == torch.float64


@pytest.mark.parametrize("partial", [True, False])
def test_a_weight_whole_and_its_gradient_in_shards(partial: bool) -> None:
    weight = torch.randn(2, 7, dtype=torch.float64)
    padded = F.pad(weight, (0, 2))
    steps = [exchange.gather_weight(a, s, 1, 7) for a, s in zip(AXES, padded.split(3, 1))]
    assert all(torch.equal(x, weight) for x in lockstep(steps))
    gs = [torch.randn_like(weight) for _ in AXES] if partial else [weight] * RANKS
    total = F.pad(sum(gs) if partial else weight, (0, 2)).split(3, 1)  # type: ignore[arg-type]
    back = [
        exchange.gather_weight_backward(a, g, 1, 3, partial, torch.float32, None)
        for a, g in zip(AXES, gs)
    ]
    for x, wanted in zip(lockstep(back), total):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("padding,scaled", [(-1, False), (5, True)])
def test_rows_of_a_table_and_their_gradient(span: Span, padding: int, scaled: bool) -> None:
    table = torch.randn(9, 4, dtype=torch.float64).requires_grad_()
    ids = torch.randint(0, 9, (2, LENGTH))
    ids[:, :2] = 5
    wanted = F.embedding(ids, table, None if padding < 0 else padding, scale_grad_by_freq=scaled)
    g = torch.randn_like(wanted)
    wanted.backward(g)
    shards = table.detach().split(3)
    got = lockstep([exchange.embed(a, span, s, ids, s.dtype) for a, s in zip(AXES, shards)])
    parts = []
    for r, x in enumerate(got):
        assert torch.equal(x, exchange.take(span, r, wanted.detach(), 1, 1))
        parts.append(exchange.clear(span, r, exchange.take(span, r, g, 1, 1), 1, 1))
    steps = [
        exchange.embed_backward(a, span, p, ids, 3, padding, scaled) for a, p in zip(AXES, parts)
    ]
    assert table.grad is not None
    for x, whole in zip(lockstep(steps), table.grad.split(3)):
        torch.testing.assert_close(x, whole)
