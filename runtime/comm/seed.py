"""The seed of a call: drawn from torch's default generator, so `torch.manual_seed` makes runs
repeat; every rank draws, all take the first rank's."""

from __future__ import annotations

import torch

from tspc.runtime.comm.drivers import distributed
from tspc.runtime.comm.place import Place
from tspc.runtime.comm.requests import Broadcast, Steps


def draw() -> torch.Tensor:
    """63 random bits."""
    return torch.empty((), dtype=torch.int64).random_()


def shared(place: Place, device: torch.device) -> torch.Tensor:
    """One seed for all ranks of the axis; collective."""
    steps = _first(draw())
    return distributed(steps, place.axis, place.groups, "the seed of a call").to(device)


def _first(seed: torch.Tensor) -> Steps[torch.Tensor]:
    handle = yield Broadcast(seed.view(1), "checks", source=0)
    return handle.wait().view(())
