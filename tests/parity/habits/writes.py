"""Models that write into their parameters in the forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.parity.habits import Side, habit, tokens


class Bounded(nn.Module):
    """A weight that the forward keeps in bounds, one that it lets fade, one that it writes
    twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(187, 16), nn.Linear(16, 187)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.bounded, self.fading, self.twice = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.double()

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.bounded.weight.data.clamp_(-0.1, 0.1)
        with torch.no_grad():
            self.fading.weight.mul_(0.9)
            self.twice.weight[0] = 0.0
        self.twice.weight.data.mul_(0.5).add_(0.01)
        x = self.embedding(ids)
        x = x + self.bounded(torch.tanh(x)) + self.fading(x)
        x = x + self.down(F.gelu(self.up(x + self.twice(x))))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@habit(build=Bounded)
def written_in_forward(side: Side) -> Any:
    optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-2)
    losses, grads = [], []
    for step in range(3):
        loss = side.loss(tokens(7, step))
        loss.backward()
        grads.append({n: g.detach().clone() for n, g in side.grads().items()})
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, grads, side.weights()
