"""Where a rank stands: its chunk of a dim, and what it does alone and among replicas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tspc.runtime.comm.place import Place, chunk_rows
from tspc.runtime.comm.requests import Axis


@pytest.mark.parametrize("size", [0, 1, 5, 6, 7])
def test_rows_of_a_chunk_are_torchs(size: int) -> None:
    parts = [len(p) for p in torch.arange(size).chunk(3)]
    wanted = [*parts, 0, 0, 0][:3] if size else [0, 0, 0]
    assert [chunk_rows(Axis("t", 3, r), size) for r in range(3)] == wanted


def test_without_replicas_all_is_as_it_is() -> None:
    place, x = Place(Axis("t", 2, 0)), torch.ones(2)
    assert place.from_first_replica(x) is x
    assert place.gather([x], [0], [2]) == [x]
    assert place.mean([x, None], [0, None]) == [x, None]


def among_replicas() -> list[Any]:
    """On a rank of a world, whose ranks are replicas."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    groups = {"replicas": dist.group.WORLD}
    place = Place(Axis("t", 1, 0), groups, Axis("replicas", ranks, rank))  # type: ignore[arg-type]
    x = torch.arange(4.0) + 10 * rank
    first = place.from_first_replica(x.clone())
    (gathered,) = place.gather([x[: 2 if rank == 0 else 1]], [0], [3])
    averaged, none, part = place.mean([x, None, x], [None, 0, 0])
    assert none is None
    meta = torch.ones(2, device="meta")
    assert place.from_first_replica(meta) is meta
    return [first, gathered, averaged, part]


@pytest.mark.dist
def test_among_replicas(world: Any) -> None:
    for rank, got in enumerate(world(2).run(among_replicas)):
        first, gathered, averaged, part = (x.tolist() for x in got)
        assert first == [0, 1, 2, 3] and gathered == [0, 1, 10]
        assert averaged == [5, 6, 7, 8] and part == averaged[2 * rank : 2 * rank + 2]
