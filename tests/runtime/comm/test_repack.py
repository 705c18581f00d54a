"""Stored chunks become the shards of a fold, and gradients of shards those of chunks."""

from __future__ import annotations

import pytest
import torch

from tspc.ir.shard import ShardMap, chunked
from tspc.runtime.comm.drivers import lockstep, record
from tspc.runtime.comm.repack import fits, repack, repack_backward
from tspc.runtime.comm.requests import Axis

RANKS = 3
# of unequal parts, with a repeated row, with pads
MAPS = {
    "chunked": chunked(0, 7, RANKS),
    "even": chunked(0, 6, RANKS),
    "moved": ShardMap(0, ((5, 0), (1, 4), (3, 2)), (((True,) * 2),) * 3),
    "repeated": ShardMap(0, ((0, 2), (1, 2), (3, 2)), ((True, True), (True, False), (True, False))),
    "padded": ShardMap(0, ((3, 0), (1, 2), (-1, -1)), ((True, True), (True, True), (False, False))),
}
SIZES = {"chunked": 7, "even": 6, "moved": 6, "repeated": 4, "padded": 4}


def chunks(x: torch.Tensor, dim: int) -> list[torch.Tensor]:
    """As torch cuts, empty ones at the end."""
    parts = list(x.chunk(RANKS, dim))
    return [*parts, *[x.narrow(dim, 0, 0)] * (RANKS - len(parts))]


@pytest.mark.parametrize("name", MAPS)
def test_shards_and_gradients_of_chunks(name: str) -> None:
    m, size = MAPS[name], SIZES[name]
    whole = torch.randn(size, 2, dtype=torch.float64)
    local, axes = chunks(whole, 0), [Axis("t", RANKS, r) for r in range(RANKS)]
    with record() as sent:
        shards = lockstep([repack(a, m, x, size) for a, x in zip(axes, local)])
    assert len(sent) == (0 if m.is_chunked(size) else 1)
    for r, s in enumerate(shards):
        assert torch.equal(s, m.take(whole, r)) and s.is_contiguous()
    gs = [torch.randn_like(s) for s in shards]
    steps = [repack_backward(a, m, g, size, len(x)) for a, g, x in zip(axes, gs, local)]
    for got, wanted in zip(lockstep(steps), chunks(m.put(gs, size), 0)):
        torch.testing.assert_close(got, wanted)


def test_along_another_dim() -> None:
    m = ShardMap(1, ((5, 0), (1, 4), (3, 2)), (((True,) * 2),) * 3)
    whole = torch.randn(2, 6)
    steps = [repack(Axis("t", RANKS, r), m, x, 6) for r, x in enumerate(chunks(whole, 1))]
    for r, s in enumerate(lockstep(steps)):
        assert torch.equal(s, m.take(whole, r))


def test_whether_a_chunk_is_the_shard() -> None:
    assert fits(MAPS["even"], (2, 4), (6, 4)) and not fits(MAPS["moved"], (2, 4), (6, 4))
    assert fits(MAPS["chunked"], (3, 4), (7, 4)) and not fits(MAPS["chunked"], (1, 4), (7, 4))
