"""The training loop itself."""

from __future__ import annotations

from typing import Any

import torch

from tests.parity.habits import Side, habit, tokens


@habit(again=True)
def two_lengths_and_adamw(side: Side) -> Any:
    optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-2)
    losses = []
    for length in (9, 9, 13, 4):
        optimizer.zero_grad()
        loss = side.loss(tokens(length))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {k: w for k, w in side.weights().items()}


@habit(again=True)
def accumulation_and_clipping(side: Side) -> Any:
    optimizer = torch.optim.SGD(side.model.parameters(), lr=1e-2, momentum=0.9)
    norms = []
    for step in range(2):
        for micro in range(2):
            (side.loss(tokens(9, 10 * step + micro)) / 2).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(side.model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
    return norms, side.weights()
