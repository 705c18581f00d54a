"""What makes a step: optimizers that look at whole matrices, steps that are compiled whole."""

from __future__ import annotations

from typing import Any

import torch

from tests.parity.habits import Side, habit, tokens


@habit()
def muon_and_adamw(side: Side) -> Any:
    matrices = [p for n, p in side.model.named_parameters() if "blocks" in n and p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in side.model.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-2)]
    losses = []
    for step in range(3):
        loss = side.loss(tokens(9, step))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, side.weights()


@habit()
def compiled_with_its_optimizer(side: Side) -> Any:
    model = side.model
    # torch's Adam in a compiled step has float32 bias corrections, on one device too
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    def step(ids: torch.Tensor) -> Any:
        loss = model(ids, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step = side.wrap(step)
    return [step(tokens(9, n)).item() for n in range(3)], side.weights()
