"""What is passed to a model, and the modes around its call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from tests.parity.habits import Side, habit, tokens
from tests.support.models import strided
from tspc.backend.tsp import GRAPHS
from tspc.base.errors import UnsupportedError


class Cached(nn.Module):
    """A block that reads a cache which its caller owns, and writes into it."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, cache: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        cache.mul_(0.5).add_(x.detach())
        return (self.narrow(torch.relu(self.wide(x)) * scale) + cache).square().mean()


def cached() -> nn.Module:
    return Cached().double()


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@habit()
def ids_and_labels_of_one_tensor(side: Side) -> Any:
    ids = tokens(10)
    losses = []
    for given, labels in (
        (ids[:, :-1], ids[:, 1:]),
        (ids.t().contiguous().t(), strided(ids)),
        (ids[:1].expand(2, -1), ids),
        (ids[:, ::2], ids[:, 1::2]),
    ):
        loss = side.call(given, labels)
        loss.backward()
        losses.append(loss)
    return losses, side.grads()


@habit(cached)
def caches_of_any_strides(side: Side) -> Any:
    both = numbers(2, 2, 8, 16)
    seen = []
    for x, cache in (
        (numbers(8, 2, 16).transpose(0, 1), both[0].clone()),
        (strided(numbers(2, 8, 16)), numbers(16, 8, 2).permute(2, 1, 0)),
        (both[:, 0].requires_grad_(False), both[:, 1]),
    ):
        side.call(x, cache).backward()
        seen.append(cache)
    leaf = numbers(8, 2, 16).transpose(0, 1).requires_grad_()
    side.call(leaf, numbers(2, 8, 16)).backward()
    return seen, both, leaf.grad, side.grads()


@habit(cached)
def a_float_that_changes(side: Side) -> Any:
    """Each value of an annealed float, past the number of graphs that Dynamo makes of a frame."""
    losses = []
    for k in range(11):
        loss = side.call(numbers(2, 8, 16), numbers(2, 8, 16), 1 - k / 20)
        loss.backward()
        losses.append(loss)
    assert not side.compiled or len(GRAPHS[side.model]) == 2  # one of the first value, one of any
    return losses, side.grads()


@habit(cached, raises=(UnsupportedError, "shares memory with"))
def a_cache_that_overlaps_another_input(side: Side) -> Any:
    rows = numbers(2, 9, 16)
    return side.call(rows[:, :-1], rows[:, 1:])


@habit()
def anomaly_detection(side: Side) -> Any:
    with torch.autograd.set_detect_anomaly(True):
        loss = side.loss()
        loss.backward()
    return loss, side.grads()


@habit()
def anomaly_detection_finds_nan(side: Side) -> Any:
    side.loss().backward()
    message = ""
    with torch.autograd.set_detect_anomaly(True):
        try:
            (side.loss() * torch.tensor(float("nan"))).backward()
        except RuntimeError as e:
            message = str(e)
    return "returned nan values" in message
