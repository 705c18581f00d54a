"""Every rank of both mesh axes in one process: what each holds, gathers, averages and updates, in
lockstep, against one device on all batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn as nn

from tests.support.models import make, tokens_of
from tspc.backend.simulated import relative_errors, simulated_backend
from tspc.runtime.comm.drivers import lockstep
from tspc.runtime.comm.replicas import gather, mean, scatter_mean
from tspc.runtime.comm.requests import Axis
from tspc.runtime.params.storage import default_dim

pytestmark = pytest.mark.sampled(4)

SHAPES = [(1, 2), (2, 1), (2, 2), (4, 1)]  # TSP ranks x replicas
STEPS, LENGTH = 5, 9


def chunks(x: torch.Tensor, dim: int, count: int) -> list[torch.Tensor]:
    """Torch's, with the empty ones."""
    rows, n = -(-x.shape[dim] // count), x.shape[dim]
    bounds = [min(i * rows, n) for i in range(count + 1)]
    return [x.narrow(dim, a, b - a) for a, b in zip(bounds, bounds[1:])]


def axes(replicas: int) -> list[Axis]:
    return [Axis("replicas", replicas, r) for r in range(replicas)]


class Stored:
    """What the ranks of one place on the TSP axis hold, and their optimizers; dims: None where a
    parameter is replicated."""

    def __init__(
        self, held: Sequence[torch.Tensor], dims: Sequence[int | None], replicas: int, cut: bool
    ):
        self.dims, self.replicas = dims, replicas
        self.cut = [i for i, d in enumerate(dims) if cut and d is not None]
        self.rest = [i for i in range(len(dims)) if i not in self.cut]
        self.sizes = [held[i].shape[dims[i]] for i in self.cut]
        self.ranks = []
        for r in range(replicas):
            own = [
                chunks(x, dims[i], replicas)[r] if i in self.cut else x for i, x in enumerate(held)
            ]
            self.ranks.append([nn.Parameter(x.detach().clone()) for x in own])

    def whole(self) -> list[torch.Tensor]:
        """The chunks, the same on every replica."""
        dims = [self.dims[i] for i in self.cut]
        found = lockstep(
            [
                gather(axis, [p[i].detach() for i in self.cut], dims, self.sizes)
                for axis, p in zip(axes(self.replicas), self.ranks)
            ]
        )
        assert all(torch.equal(a, b) for f in found for a, b in zip(f, found[0]))
        out = [p.detach() for p in self.ranks[0]]
        assert all(torch.equal(p[i], out[i]) for p in self.ranks for i in self.rest)
        for i, x in zip(self.cut, found[0]):
            out[i] = x
        return out

    def give(self, grads: Sequence[Sequence[torch.Tensor]]) -> None:
        """The gradients of the chunks, per replica."""
        dims = [self.dims[i] for i in self.cut]
        cut, rest = (
            lockstep([fn(a, [g[i] for i in at], *more) for a, g in zip(axes(self.replicas), grads)])
            for fn, at, more in ((scatter_mean, self.cut, (dims,)), (mean, self.rest, ()))
        )
        for p, mine, others in zip(self.ranks, cut, rest):
            for at, given in ((self.cut, mine), (self.rest, others)):
                for i, g in zip(at, given):
                    p[i].grad = g


def optimizer(parameters: Sequence[nn.Parameter], adam: bool) -> torch.optim.Optimizer:
    if adam:
        return torch.optim.AdamW(parameters, lr=1e-2)
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)


@cache
def simulated(ranks: int) -> tuple[nn.Module, Any]:
    torch._dynamo.reset()
    model = make("llama_like", layers=1)
    return model, torch.compile(model, backend=simulated_backend(ranks), dynamic=True)


def updates(ranks: int, replicas: int, cut: bool, adam: bool, accumulate: int) -> list[list]:
    """How five steps change the parameters: (on all ranks, on one device)."""
    (model, fn), one = simulated(ranks), make("llama_like", layers=1)
    model.load_state_dict(one.state_dict())
    start = [p.detach().clone() for p in model.parameters()]
    dims = [default_dim(p) for p in start]
    held = [
        [x if d is None else chunks(x, d, ranks)[k] for x, d in zip(start, dims)]
        for k in range(ranks)
    ]
    stored = [Stored(h, dims, replicas, cut) for h in held]
    optimizers = [optimizer(p, adam) for s in stored for p in s.ranks]
    reference = optimizer(list(one.parameters()), adam)
    wholes = start
    for step in range(STEPS):
        batches = [
            [tokens_of(LENGTH, 1, seed=100 * step + 10 * m + r) for r in range(replicas)]
            for m in range(accumulate)
        ]
        grads = []
        for r in range(replicas):
            model.zero_grad()
            for micro in batches:
                (fn(micro[r], micro[r]) / accumulate).backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for k, s in enumerate(stored):
            s.give(
                [
                    [x if d is None else chunks(x, d, ranks)[k] for x, d in zip(g, dims)]
                    for g in grads
                ]
            )
        for o in optimizers:
            o.step()
        found = [s.whole() for s in stored]
        wholes = [
            found[0][i] if d is None else torch.cat([f[i] for f in found], d)
            for i, d in enumerate(dims)
        ]
        with torch.no_grad():
            for p, x in zip(model.parameters(), wholes):
                p.copy_(x)
        reference.zero_grad()
        for micro in batches:
            every = torch.cat(micro)
            (one(every, every) / accumulate).backward()
        reference.step()
    ends = [list(wholes), [p.detach() for p in one.parameters()]]
    return [[x - s for x, s in zip(end, start)] for end in ends]


@pytest.mark.parametrize("ranks, replicas", SHAPES)
@pytest.mark.parametrize("cut", [False, True], ids=["replicate", "shard"])
@pytest.mark.parametrize("adam, accumulate", [(False, 1), (False, 3), (True, 1), (True, 3)])
def test_steps_equal_one_device(
    ranks: int, replicas: int, cut: bool, adam: bool, accumulate: int
) -> None:
    mine, one = updates(ranks, replicas, cut, adam, accumulate)
    names = [str(i) for i in range(len(one))]
    assert len(names) > 5
    errors = relative_errors(dict(zip(names, mine)), dict(zip(names, one)))
    assert max(errors.values()) <= 1e-9
