"""Communications as data, and an axis as one rank sees it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tspc.runtime.comm import requests
from tspc.runtime.comm.drivers import lockstep
from tspc.runtime.comm.requests import AllReduce, Axis, Broadcast, Exchange, Reduce, Shift, Steps

X = torch.arange(3.0)


def test_defaults_and_fields() -> None:
    assert (Shift(X).link, Broadcast(X, "weights", 2).source, Reduce(X).target) == (
        "activations",
        2,
        0,
    )
    assert (Exchange(X).sent, Exchange(X).received) == ((), ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        AllReduce(X).link = "other"  # type: ignore[misc]


def test_axes_compare_by_their_fields() -> None:
    assert Axis("tsp", 2, 1) == Axis("tsp", 2, 1) != Axis("tsp", 2, 0)
    kinds = [c for c in vars(requests).values() if isinstance(c, type)]
    assert sum(issubclass(c, requests.Request) for c in kinds) == 9


def test_a_generator_is_answered_by_handles() -> None:
    def steps() -> Steps[torch.Tensor]:
        handle = yield AllReduce(X)
        return handle.wait() * 2

    assert torch.equal(lockstep([steps(), steps()])[1], X * 4)
