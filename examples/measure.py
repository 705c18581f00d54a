"""What a training step holds: parameters, gradients, optimizer state, and the activations that
live for the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile


def local_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors that this rank holds."""
    total = 0
    for t in tensors:
        if isinstance(t, torch.Tensor):
            local = t.to_local() if isinstance(t, DTensor) else t
            total += local.numel() * local.element_size()
    return total


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Parameters, gradients and optimizer state of this rank, in bytes."""
    parameters = list(model.parameters())
    states = [v for s in optimizer.state.values() for v in s.values()]
    return {
        "parameters": local_bytes(parameters),
        "gradients": local_bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer": local_bytes(states),
    }


def peak_of(step: Callable[[], Any]) -> tuple[int, int, Any]:
    """(peak, alive at the end, result): allocator bytes above those at the start of `step`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        result = step()
    peak = now = 0
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    return peak, now, result
