"""Gradients over the replicas: their means, or under `no_sync` kept until the next backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tests.support.group import stored
from tspc.base.errors import PendingGradientError, PlanError
from tspc.runtime.comm.place import Place
from tspc.runtime.comm.requests import Axis
from tspc.runtime.params import accumulate
from tspc.runtime.params.accumulate import Kept, no_sync, reduced

G = torch.arange(12.0, dtype=torch.float64).view(4, 3)


@pytest.fixture
def sharded() -> Iterator[tuple[nn.Linear, Place]]:
    """With one replica, as there are several."""
    with stored(nn.Linear(3, 4).double()) as (m, place):
        groups = {**place.groups, "replicas": dist.group.WORLD, "replica checks": dist.group.WORLD}
        yield m, replace(place, replicas=Axis("replicas", 1, 0), groups=groups)  # type: ignore[arg-type]


def backward(m: nn.Linear, place: Place, g: torch.Tensor | None) -> Any:
    return reduced(place, [m.weight], ["weight"], [g], None)[0]


def test_gradients_are_stored_like_their_parameters(sharded: tuple[nn.Linear, Place]) -> None:
    m, place = sharded
    got = backward(m, place, G)
    assert isinstance(got, DTensor) and got.placements == m.weight.placements
    assert torch.equal(got.to_local(), G) and backward(m, place, None) is None
    assert not accumulate.is_cut(m.weight)


def test_kept_gradients_come_with_the_next_backward(sharded: tuple[nn.Linear, Place]) -> None:
    m, place = sharded
    with no_sync(m):
        assert backward(m, place, G) is None and backward(m, place, 2 * G) is None
    assert isinstance(m.weight.grad, Kept) and torch.equal(m.weight.grad.total, 3 * G)
    got = backward(m, place, G)
    assert torch.equal(got.to_local(), 4 * G) and m.weight.grad is None


def test_kept_gradients_of_other_graphs_come_too(sharded: tuple[nn.Linear, Place]) -> None:
    m, place = sharded
    with no_sync(m):
        backward(m, place, G)
    reduced(place, [m.bias], ["bias"], [G[:, 0].clone()], None)
    assert isinstance(m.weight.grad, DTensor) and torch.equal(m.weight.grad.to_local(), G)
    with no_sync(m):
        backward(m, place, G)
    m.weight.grad = None
    reduced(place, [m.bias], ["bias"], [G[:, 0].clone()], None)
    assert m.weight.grad is None and not accumulate._OPEN


def test_what_is_kept_can_only_be_cleared_or_added_to(sharded: tuple[nn.Linear, Place]) -> None:
    m, place = sharded
    m.weight.grad = torch.ones_like(m.weight)
    with no_sync(m):
        backward(m, place, G)
    kept = m.weight.grad
    assert isinstance(kept, Kept) and repr(kept) == "Kept()"
    with pytest.raises(PendingGradientError, match="are not averaged over the replicas yet"):
        kept + 1
    kept.add_(torch.ones_like(m.weight))
    assert kept.before is not None and (kept.before.to_local() == 2).all()
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    with pytest.raises(PendingGradientError, match=r"SGD.step\(\)"):
        optimizer.step()
    torch._foreach_zero_([kept])
    assert isinstance(m.weight.grad, DTensor) and not m.weight.grad.to_local().any()
    with no_sync(m):
        backward(m, place, G)
    m.weight.grad.zero_()
    assert isinstance(m.weight.grad, DTensor)


def test_without_replicas_nothing_is_kept(sharded: tuple[nn.Linear, Place]) -> None:
    m, place = sharded
    with no_sync(m):
        assert torch.equal(backward(m, replace(place, replicas=None), G).to_local(), G)


def test_what_is_no_module() -> None:
    with pytest.raises(PlanError, match="no_sync takes a module"), no_sync(3):  # type: ignore[arg-type]
        pass


def test_chunks_that_are_cut_over_the_replicas_too() -> None:
    def on(*placements: Placement) -> Any:
        return SimpleNamespace(placements=placements)

    assert accumulate.is_cut(on(Shard(0), Shard(1)))
    assert not accumulate.is_cut(on(Shard(0), Replicate())) and not accumulate.is_cut(on(Shard(0)))
