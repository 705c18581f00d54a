"""A function of tensors on D ranks in one process: its graph, with tspc's ops in it, runs in
lockstep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tspc.runtime import simulate

AXIS = "ranks-in-a-test"
Inputs = Sequence[torch.Tensor]


def on_ranks(fn: Callable[..., Sequence[Any]], inputs: Sequence[Inputs]) -> list[list[Any]]:
    """What it returns on each rank; inputs: of each rank, alike in shape. The ops' axis is AXIS."""
    gm = make_fx(fn, tracing_mode="fake")(*inputs[0])
    return simulate.run(gm, AXIS, inputs)


def with_gradients(
    fn: Callable[..., torch.Tensor], inputs: Sequence[Inputs], cotangents: Inputs
) -> list[list[torch.Tensor]]:
    """On each rank the result of a function and the gradients of its float inputs, by the cotangent
    of the rank."""

    def both(*flat: torch.Tensor) -> list[torch.Tensor]:
        operands = [x.detach().requires_grad_(x.is_floating_point()) for x in flat[:-1]]
        out = fn(*operands)
        wanted = [x for x in operands if x.requires_grad]
        return [out, *torch.autograd.grad(out, wanted, flat[-1])]

    return on_ranks(both, [[*x, g] for x, g in zip(inputs, cotangents)])
