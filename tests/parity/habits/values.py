"""Parameters and gradients as people handle them outside of the model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.parity.habits import Side, habit, tokens


class Table(nn.Module):
    """model(ids, labels) -> loss; the vocabulary does not divide by the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(187, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 187)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(self.embed(ids)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def table() -> nn.Module:
    return Table().double()


@habit(table, again=True)
def host_values_of_gradients(side: Side) -> Any:
    side.loss().backward()
    found = {}
    for n, p in side.model.named_parameters():
        g = p.grad
        found[n] = [
            *(p.norm().item(), float(p.pow(2).sum()), g.abs().max().item(), p.mean(), p.std()),
            *(
                (p > 0).sum().item(),
                torch.linalg.norm(p),
                bool(torch.isnan(g).any()),
                int(p.argmax()),
            ),
            *(f"{p.norm():.6f}", str(p.detach().norm()), g.median(), g.topk(2)[0], p.tolist()[-1]),
            *(
                p.detach().cpu().numpy(),
                torch.allclose(p, g),
                torch.equal(p, p),
                len(p),
                p.amax(-1),
            ),
        ]
    grads = [p.grad for p in side.model.parameters()]
    whole = torch.stack([g.norm() for g in grads]).norm()
    return [
        *(
            found,
            whole,
            torch.stack(torch._foreach_norm(grads)),
            torch.nn.utils.get_total_norm(grads),
        ),
        *(
            torch.nn.utils.parameters_to_vector(side.model.parameters()),
            sum(g.sum() for g in grads),
        ),
    ]


@habit(table, again=True)
def clipping_by_hand_and_a_guard(side: Side) -> Any:
    optimizer = torch.optim.SGD(side.model.parameters(), lr=0.1)
    norms = []
    for step in range(2):
        optimizer.zero_grad()
        side.loss(tokens(9, step)).backward()
        total = sum(p.grad.pow(2).sum().item() for p in side.model.parameters()) ** 0.5
        for p in side.model.parameters():
            p.grad.mul_(min(1.0, 0.5 / (total + 1e-6)))
        if any(torch.isnan(p.grad).any() for p in side.model.parameters()):
            continue
        optimizer.step()
        norms.append(total)
    return norms, side.weights()


@habit(table, again=True)
def penalties(side: Side) -> Any:
    """Beside the loss, in one backward and in one of their own."""
    loss = side.loss() + 1e-3 * sum(p.pow(2).sum() for p in side.model.parameters())
    loss.backward()
    wide = side.model.head.weight
    (wide.T @ wide - torch.eye(6)).pow(2).mean().backward()
    sum(p.abs().sum() for p in side.model.parameters() if p.dim() > 1).mul(1e-3).backward()
    return loss.detach(), side.grads()


@habit(table, again=True)
def an_optimizer_of_one_s_own(side: Side) -> Any:
    state = {
        n: [torch.zeros(p.shape, dtype=p.dtype) for _ in range(2)]
        for n, p in side.model.named_parameters()
    }
    ema = {n: p.detach().clone() for n, p in side.model.named_parameters()}
    for step in range(1, 4):
        side.loss(tokens(9, step)).backward()
        with torch.no_grad():
            for n, p in side.model.named_parameters():
                m, v = state[n]
                m.mul_(0.9).add_(p.grad, alpha=0.1)
                v.mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                p.add_(-1e-2 * m / (1 - 0.9**step) / ((v / (1 - 0.99**step)).sqrt() + 1e-8))
                p.grad = None
                ema[n].mul_(0.9).add_(p, alpha=0.1)
    return state, ema, side.weights()


@habit(table, again=True)
def a_moving_average_that_is_loaded(side: Side) -> Any:
    ema = {n: p.detach().clone() for n, p in side.model.named_parameters()}
    optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-2)
    for step in range(2):
        side.loss(tokens(9, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(list(ema.values()), list(side.model.parameters()), 0.5)
    with torch.no_grad():
        for n, p in side.model.named_parameters():
            p.copy_(ema[n])
    return ema, side.loss()


@habit(table, again=True)
def noise_and_masks(side: Side) -> Any:
    side.loss().backward()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in side.model.parameters():
            p.grad.add_(torch.randn_like(p.grad), alpha=0.1)
            p.grad.mul_(torch.rand(p.shape) > 0.3)
            p.add_(0.01 * torch.rand_like(p))
            p.mul_(p.abs() > 0.01)
            p[0] = 0
    after = torch.rand(3)
    return side.grads(), side.weights(), after


@habit(table, again=True)
def a_loss_in_chunks(side: Side) -> Any:
    """The head's weight taken out of the model, with plain activations."""
    side.loss().backward()
    torch.manual_seed(1)
    h = torch.randn(2, 8, 6, dtype=torch.float64, requires_grad=True)
    ids = tokens(8)
    total = 0.0
    for a, b in zip(h.split(3, 1), ids.split(3, 1)):
        logits = F.linear(a, side.model.head.weight, side.model.head.bias)
        total = total + F.cross_entropy(logits.flatten(0, 1), b.flatten(), reduction="sum")
    (total / ids.numel()).backward()
    return total.detach(), h.grad, side.grads()


@habit(table, again=True)
def gradients_taken_apart(side: Side) -> Any:
    loss = side.loss()
    params = list(side.model.parameters())
    grads = torch.autograd.grad(loss, params)
    dot = sum((g * g).sum() for g in grads)
    second = side.loss(tokens(9, 4))
    others = torch.autograd.grad(second, params)
    flat, flat2 = (torch.cat([g.flatten() for g in gs]) for gs in (grads, others))
    return dot, F.cosine_similarity(flat, flat2, 0), [g.sign().sum() for g in grads]


@habit(table, again=True)
def two_copies_compared(side: Side) -> Any:
    side.loss().backward()
    other = copy.deepcopy(side.model)
    same = [torch.equal(p, q) for p, q in zip(side.model.parameters(), other.parameters())]
    with torch.no_grad():
        for p in side.model.parameters():
            p.mul_(1.5)
    pairs = list(zip(side.model.parameters(), other.parameters()))
    far = sum((p - q).square().sum() for p, q in pairs)
    far.backward()
    return same, far.detach(), [p.grad for p in other.parameters()], side.grads()


@habit(table, again=True)
def written_to_a_board(side: Side) -> Any:
    """As a SummaryWriter converts."""

    def make_np(x: torch.Tensor) -> np.ndarray:
        return x.detach().cpu().numpy()

    side.loss().backward()
    norm = torch.nn.utils.clip_grad_norm_(side.model.parameters(), 0.1)
    hist = [np.histogram(make_np(p), 4)[0] for p in side.model.parameters()]
    return make_np(norm), hist, [make_np(p.grad) for p in side.model.parameters()]
