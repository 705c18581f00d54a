"""Shard maps: shards of a whole weight and back, pads as zeros or repeated rows."""

from __future__ import annotations

import pytest
import torch

from tspc.ir.shard import ShardMap, chunked

WHOLE = torch.arange(10, dtype=torch.float64).view(5, 2)


def test_chunks_are_torchs_padded_with_zeros() -> None:
    m = chunked(0, 5, 3)
    assert m.rows == ((0, 1), (2, 3), (4, -1)) and m.real[2] == (True, False) and m.length == 2
    shards = [m.take(WHOLE, j) for j in range(3)]
    assert torch.equal(torch.cat(shards)[:5], WHOLE) and shards[2][1].tolist() == [0, 0]
    assert all(s.is_contiguous() for s in shards)
    assert torch.equal(m.put(shards, 5), WHOLE)


def test_along_another_dim() -> None:
    m = chunked(1, 2, 2)
    assert torch.equal(m.take(WHOLE, 1), WHOLE[:, 1:]) and m.is_chunked(2)
    assert torch.equal(m.put([WHOLE[:, :1], WHOLE[:, 1:]], 2), WHOLE)


def test_a_repeated_row_has_no_gradient_and_a_shared_one_all() -> None:
    m = ShardMap(0, ((0, 2), (1, 0), (2, 2)), ((True, True), (True, True), (True, False)))
    assert m.take(WHOLE, 2).tolist() == [[4, 5], [4, 5]]
    ones = [torch.full((2, 2), 10.0**j) for j in range(3)]
    assert m.put(ones, 3).tolist() == [[11, 11], [10, 10], [101, 101]]


@pytest.mark.parametrize(
    "rows,real,size,answer",
    [
        (((0, 1), (2, 3)), ((True, True), (True, True)), 4, True),
        (((0, 1), (2, 2)), ((True, True), (True, False)), 3, True),
        (((0, 1), (3, 2)), ((True, True), (True, True)), 4, False),
        (((0, 1), (2, 3)), ((True, True), (True, True)), 5, False),
        (((0, 1), (2, 3)), ((True, True), (True, True)), 3, False),
        (((0, 1), (2, 3)), ((True, True), (True, False)), 4, False),
        (((0, 2), (1, 3)), ((True, True), (True, True)), 4, False),
    ],
)
def test_whether_they_are_torchs_chunks(rows: tuple, real: tuple, size: int, answer: bool) -> None:
    m = ShardMap(0, rows, real)
    assert m.is_chunked(size) is answer and m.is_chunked(size) is answer
    assert m.answers == {size: answer}
