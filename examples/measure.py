"""What a rank holds: bytes of parameters, gradients and optimizer state, and what the allocator gave out.

Allocator bytes are the memory events of torch.profiler, which see every CPU allocation of torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor


@dataclass
class Allocations:
    """Bytes above those at the start of the block: the highest, and those still alive at its end."""

    peak: int = 0
    alive: int = 0


@contextlib.contextmanager
def allocations() -> Iterator[Allocations]:
    """The allocator's bytes inside of the block; the numbers are there once it has ended."""
    found = Allocations()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield found
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        found.alive += event.nbytes()
        found.peak = max(found.peak, found.alive)


def local_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes on this rank; of a DTensor its own part, of a storage that several share one count."""
    storages = {}
    for t in tensors:
        if t is not None:
            t = t.to_local() if isinstance(t, DTensor) else t
            storages[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
    return sum(storages.values())


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state on this rank."""
    parameters = list(model.parameters())
    state = [
        v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
    ]
    return {
        "parameters": local_bytes(parameters),
        "gradients": local_bytes(p.grad for p in parameters),
        "optimizer": local_bytes(state),
    }
