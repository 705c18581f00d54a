"""Layouts: which rows each rank holds, rank order and order, and back."""

from __future__ import annotations

import pytest
import torch

from tspc.ir.layout import Along, Layout, Span

LENGTH = 11
CASES = [(d, order) for d in (1, 2, 3) for order in ("contiguous", "zigzag")]


@pytest.mark.parametrize("ranks,order", CASES)
def test_every_row_is_held_once(ranks: int, order: str) -> None:
    layout = Layout(ranks, order)
    rows = int(layout.chunk_rows(LENGTH))
    assert rows * layout.chunks * ranks >= LENGTH
    held = []
    for r in range(ranks):
        at, real = layout.positions(r, rows, LENGTH), layout.valid(r, rows, LENGTH)
        assert len(at) == len(real) == Span(layout, rows, LENGTH).local
        held += at[real].tolist()
        assert set(at[~real].tolist()) <= {LENGTH - 1}
    assert sorted(held) == list(range(LENGTH))


@pytest.mark.parametrize("ranks,order", CASES)
def test_rank_order_and_order_are_inverse(ranks: int, order: str) -> None:
    layout = Layout(ranks, order)
    rows = int(layout.chunk_rows(LENGTH))
    whole = torch.randn(2, LENGTH, 3, dtype=torch.float64)
    blocks = layout.blocks(whole, 1, rows)
    assert blocks.shape[1] == rows * layout.chunks * ranks
    assert torch.equal(layout.whole(blocks, 1, rows, LENGTH), whole)
    assert torch.equal(layout.by_rank(layout.in_order(blocks, 1, rows), 1, rows), blocks)
    for r, part in enumerate(blocks.chunk(ranks, 1)):
        at, real = layout.positions(r, rows, LENGTH), layout.valid(r, rows, LENGTH)
        assert torch.equal(part[:, real], whole[:, at[real]])
        assert not part[:, ~real].any()


def test_a_rank_has_an_early_and_a_late_chunk() -> None:
    assert Layout(3, "zigzag").all_chunk_ids() == [0, 5, 1, 4, 2, 3]
    assert Layout(3).all_chunk_ids() == [0, 1, 2] and Layout(3).chunk_ids(1) == [1]


def test_a_chunk_has_two_rows_at_least() -> None:
    assert Layout(4, "zigzag").chunk_rows(3) == 2 and Layout(2).chunk_rows(9) == 5


def test_a_dim_with_a_sequence_tells_its_span() -> None:
    at = Along(1, 2, 3, 4, 15, "zigzag", "tsp")
    assert at.span(2) == Span(Layout(2, "zigzag"), 4, 15) and at.span(2).local == 8
