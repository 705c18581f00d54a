"""What is made of a model before its first call, and what that call is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.parity.habits import Side, habit, tokens
from tests.parity.habits.breaks import chain


def stepped(side: Side, optimizer: Any, after: Any = lambda: None) -> list[float]:
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        loss = side.loss(tokens(9, step))
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.item())
    return losses


@habit(chain)
def averages(side: Side) -> Any:
    """A class of torch's and a copy by hand."""
    model = side.model
    kept = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    copied = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def after() -> None:
        kept.update_parameters(model)
        for mine, p in zip(copied.parameters(), model.parameters()):
            mine.lerp_(p, 0.1)

    losses = stepped(side, torch.optim.AdamW(model.parameters(), lr=1e-2), after)
    ids = tokens()
    made = [dict(m.named_parameters()) for m in (kept.module, copied)]
    return losses, made, kept(ids, ids), side.loss()


@habit(chain)
def schedules_scales_and_an_overflow(side: Side) -> Any:
    model = side.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)
    rest = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, rest], [1])
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    told = []
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(side.loss(tokens(9, step))).backward()
        if step == 1:  # in the rows of one rank
            noise = torch.zeros(187, 16, dtype=torch.float64)
            noise[180, 3] = float("inf")
            model.embed.weight.grad.add_(noise)
        scaler.unscale_(optimizer)
        if step != 1:
            told.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        told.append((scaler.get_scale(), optimizer.param_groups[0]["lr"]))
    return told, side.weights()


@habit(chain)
def inference_before_training(side: Side) -> Any:
    """A copy is made of the sharded model too; a group is added later, a part frozen."""
    model = side.model
    with torch.inference_mode():
        first = side.loss().item()
    optimizer = torch.optim.AdamW(model.blocks.parameters(), lr=1e-2)
    losses = stepped(side, optimizer)
    copied = copy.deepcopy(model)
    optimizer.add_param_group({"params": [model.norm.weight], "lr": 1e-1})
    model.blocks[0].requires_grad_(False)
    losses += stepped(side, optimizer)
    ids = tokens()
    return first, losses, side.weights(), copied(ids, ids)


@habit(chain)
def steps_before(side: Side) -> Any:
    """The state of an optimizer goes over with its parameters."""
    model, ids = side.model, tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(ids, ids).backward()
    optimizer.step()
    losses = stepped(side, optimizer)
    return losses, side.weights(), [s["exp_avg"] for s in optimizer.state.values()]
