"""Parameters as people handle them between steps: frozen, pruned, averaged, flattened, restored."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.parity.habits import Side, habit, tokens


def stepped(side: Side, optimizer: torch.optim.Optimizer, steps: int = 2, seed: int = 0) -> Any:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = side.loss(tokens(9, seed + step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adamw(side: Side) -> torch.optim.Optimizer:
    return torch.optim.AdamW(side.model.parameters(), lr=1e-2)


@habit(again=True)
def the_best_so_far_is_restored(side: Side) -> Any:
    optimizer = adamw(side)
    losses = stepped(side, optimizer)
    best = copy.deepcopy(side.model.state_dict())
    losses += stepped(side, optimizer, seed=5)
    side.model.load_state_dict(best)
    return losses, stepped(side, adamw(side), seed=9), side.weights()


@habit(again=True)
def frozen_and_thawed(side: Side) -> Any:
    def table() -> nn.Parameter:
        return next(p for p in side.model.parameters() if p.shape[0] == 187)

    table().requires_grad_(False)
    losses = stepped(side, adamw(side))
    assert table().grad is None
    table().requires_grad_(True)
    return losses, stepped(side, adamw(side), seed=5), side.weights()


@habit(again=True)
def groups_by_kind_and_depth(side: Side) -> Any:
    named = list(side.model.named_parameters())
    groups = [
        {"params": [p], "lr": 1e-2 * 0.9**k, "weight_decay": 0.1 if p.dim() > 1 else 0.0}
        for k, (_, p) in enumerate(named)
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = side.loss(tokens(9, step))
        loss.backward()
        optimizer.step()
        schedule.step(loss.detach())
        losses.append(loss.item())
    return losses, [g["lr"] for g in optimizer.param_groups], side.weights()


@habit(again=True)
def flattened_and_put_back(side: Side) -> Any:
    side.loss().backward()
    flat = nn.utils.parameters_to_vector(side.model.parameters())
    gradient = torch.cat([p.grad.reshape(-1) for p in side.model.parameters()])
    nn.utils.vector_to_parameters(flat - 0.1 * gradient, side.model.parameters())
    return flat, gradient, side.loss().item(), side.weights()


@habit(again=True)
def sharpness_aware(side: Side) -> Any:
    """SAM: a step up along the gradient, the gradient there, the step down from where it was."""
    optimizer, losses = torch.optim.SGD(side.model.parameters(), lr=0.1), []
    for step in range(2):
        batch = tokens(9, step)
        loss = side.loss(batch)
        loss.backward()
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in side.model.parameters()]), p=2)
        old = {}
        with torch.no_grad():
            for p in side.model.parameters():
                old[p] = p.data.clone()
                p.add_(p.grad * (0.05 / (norm + 1e-12)))
        optimizer.zero_grad()
        side.loss(batch).backward()
        with torch.no_grad():
            for p in side.model.parameters():
                p.data = old[p]
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.item(), norm.item()))
    return losses, side.weights()


@habit(again=True)
def lookahead(side: Side) -> Any:
    slow = [p.clone().detach() for p in side.model.parameters()]
    losses = stepped(side, adamw(side))
    for p, s in zip(side.model.parameters(), slow):
        s.add_(0.5 * (p.data - s))
        p.data.copy_(s)
    return losses, stepped(side, adamw(side), seed=5), side.weights()


@habit(again=True)
def elastic_weights(side: Side) -> Any:
    """EWC: squared gradients of one task weigh how far the next may go."""
    start = {n: p.clone().detach() for n, p in side.model.named_parameters()}
    side.loss(tokens(9, 3)).backward()
    fisher = {n: p.grad.detach() ** 2 for n, p in side.model.named_parameters()}
    side.model.zero_grad()
    optimizer, losses = adamw(side), []
    for step in range(2):
        optimizer.zero_grad()
        loss = side.loss(tokens(9, step))
        for n, p in side.model.named_parameters():
            loss = loss + 10 * (fisher[n] * (p - start[n]) ** 2).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, side.weights()


@habit(again=True)
def gradients_by_name(side: Side) -> Any:
    """`torch.autograd.grad` in place of a backward, and an update by hand."""
    losses = []
    for step in range(2):
        loss = side.loss(tokens(9, step))
        grads = torch.autograd.grad(loss, list(side.model.parameters()))
        with torch.no_grad():
            for p, g in zip(side.model.parameters(), grads):
                p -= 0.1 * g
        losses.append(loss.item())
    return losses, grads, side.weights()


@habit(again=True)
def gradients_of_two_tasks_projected(side: Side) -> Any:
    """PCGrad: what of one task's gradient goes against the other's is taken out."""
    grads = []
    for seed in (0, 1):
        side.model.zero_grad()
        side.loss(tokens(9, seed)).backward()
        grads.append([p.grad.clone() for p in side.model.parameters()])
    for a, b, p in zip(*grads, side.model.parameters()):
        dot = torch.dot(a.flatten(), b.flatten())
        if dot < 0:
            a = a - dot / b.norm() ** 2 * b
        p.grad = a + b
    torch.optim.SGD(side.model.parameters(), lr=0.1).step()
    return side.weights()


@habit(again=True)
def pruned_by_magnitude(side: Side) -> Any:
    masks = {}
    with torch.no_grad():
        for n, p in side.model.named_parameters():
            if p.dim() == 2:
                edge = p.abs().flatten().kthvalue(p.numel() // 4).values
                masks[n] = (p.abs() > edge).to(p.dtype)
                p.mul_(masks[n])
    optimizer, losses = adamw(side), []
    for step in range(2):
        optimizer.zero_grad()
        loss = side.loss(tokens(9, step))
        loss.backward()
        for n, p in side.model.named_parameters():
            if n in masks:
                p.grad.mul_(masks[n])
        optimizer.step()
        losses.append(loss.item())
    zeros = sum(int((p == 0).sum()) for p in side.model.parameters())
    return losses, zeros, side.weights()


@habit(again=True)
def initialized_after_compile(side: Side) -> Any:
    def init(m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            nn.init.constant_(m.weight, 0.02)
            m.weight.data[0].mul_(2.0)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    side.loss().backward()
    side.model.zero_grad()
    side.model.apply(init)
    return stepped(side, adamw(side)), side.weights()


@habit(again=True)
def statistics_of_a_step(side: Side) -> Any:
    optimizer, told = adamw(side), []
    for step in range(2):
        before = [p.detach().clone() for p in side.model.parameters()]
        stepped(side, optimizer, 1, step)
        for p, b in zip(side.model.parameters(), before):
            told.append(((p - b).norm() / (b.norm() + 1e-8)).item())
        told += [p.grad.std().item() for p in side.model.parameters() if p.numel() > 1]
        told += [p.grad.abs().flatten().topk(3).values for p in side.model.parameters()]
        told.append(torch.cat([p.grad.flatten() for p in side.model.parameters()]).quantile(0.5))
    return told


@habit(again=True)
def zeros_are_kept(side: Side) -> Any:
    """Gradients that are set to zero and not to None."""
    optimizer = torch.optim.SGD(side.model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss = side.loss(tokens(9, step))
        loss.backward()
        nn.utils.clip_grad_value_(side.model.parameters(), 0.01)
        optimizer.step()
        losses.append(loss.item())
    side.model.zero_grad(set_to_none=False)
    return losses, side.grads(), side.weights()


@habit(again=True)
def evaluated_between_steps(side: Side) -> Any:
    """A slice as a batch, an accuracy, a perplexity, a sample at a time."""
    optimizer, told = adamw(side), []
    data = torch.cat([tokens(9, s) for s in range(3)])
    for _ in range(2):
        side.model.train()
        for i in range(0, len(data), 2):
            optimizer.zero_grad()
            loss = side.loss(data[i : i + 2])
            loss.backward()
            optimizer.step()
        side.model.eval()
        with torch.no_grad():
            each = torch.stack([side.loss(row[None]) for row in data])
        told.append((each.mean().exp().item(), each.argmax().item(), loss.item()))
    return told


@habit()
def closure_of_lbfgs(side: Side) -> Any:
    optimizer = torch.optim.LBFGS(side.model.parameters(), lr=0.5, max_iter=4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = side.loss()
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(2)], side.weights()


@habit(again=True)
def tied_after_compile(side: Side) -> Any:
    """Weights that are given another's values, and a penalty that ties them."""
    pairs = [p for p in side.model.parameters() if p.dim() == 2]
    pairs = [(a, b) for a, b in zip(pairs, pairs[1:]) if a.shape == b.shape]
    losses, optimizer = stepped(side, adamw(side), 1), adamw(side)
    for step in range(2):
        optimizer.zero_grad()
        loss = side.loss(tokens(9, step))
        ties = [F.mse_loss(a, b) + (a - b).abs().max() for a, b in pairs]
        loss = loss + sum(ties) if ties else loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, len(pairs), side.weights()
