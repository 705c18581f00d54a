"""Buffers that the forward writes are on simulated ranks what they are on one device, over several
calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import tspc
from examples.llama_like import LlamaLike
from tests.support.models import tokens_of
from tspc.backend.simulated import relative_errors, simulated_backend


class Tracking(LlamaLike):
    """A step counter, a running mean over the sequence, a memory of the last rows."""

    def __init__(self) -> None:
        super().__init__(187, 32, 1, 4, 2, 50)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(32), persistent=False)
        self.register_buffer("last", torch.zeros(2, 3, 32))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embedding(tokens)
        if self.training:
            self.steps += 1
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
            self.last.copy_(x[:, -3:].detach())
        return super().forward(tokens, labels) + (x * self.mean).sum() * self.steps


class Normed(nn.Module):
    """BatchNorm over the tokens between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(187, 16), nn.BatchNorm1d(24)
        self.wide, self.narrow = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = self.wide(self.embedding(tokens))
        return self.narrow(self.norm(x.flatten(0, 1)).view_as(x).relu()).square().mean()


@pytest.mark.parametrize("make", [Tracking, Normed])
def test_written_buffers_equal_one_device(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, one = make().double(), make().double()
    one.load_state_dict(model.state_dict())
    fn = torch.compile(model, backend=simulated_backend(3), dynamic=True)
    for length in (7, 12, 9):
        tokens = tokens_of(length)
        for f in (fn, one):
            f(tokens, tokens).backward()
        mine, wanted = ({n: b.double() for n, b in m.named_buffers()} for m in (model, one))
        assert max(relative_errors(mine, wanted).values()) < 1e-12
        grads = [{n: p.grad for n, p in m.named_parameters()} for m in (model, one)]
        assert max(relative_errors(*grads).values()) < 1e-9
    model.eval(), one.eval()
    before = {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad():
        assert float((fn(tokens, tokens) - one(tokens, tokens)).abs()) < 1e-9
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_verify_compares_buffers() -> None:
    model = Tracking().double()
    found = tspc.verify(model, (tokens_of(9),) * 2, ranks=2, tolerance=1e-9)
    assert found.errors["buffer"].keys() == {"frequencies", "steps", "mean", "last"}
    assert not model.steps
