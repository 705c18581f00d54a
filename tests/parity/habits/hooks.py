"""Hooks on parameters and on modules, and parameters that a model gives out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from tests.parity.habits import Side, habit, tokens
from tests.parity.habits.breaks import Chain, chain, trained
from tests.support.models import whole


class Regularized(Chain):
    """model(tokens, labels) -> the loss, a weight that it uses and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(5, 4))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        return super().forward(ids, labels), self.first.weight, self.spare


@habit(chain)
def parameter_hooks(side: Side) -> Any:
    """Set before the first call and after it, removed between two."""
    model, seen, before = side.model, {}, {}
    up = model.blocks[0].up.weight
    double = model.first.weight.register_hook(lambda g: 2 * g)
    model.embed.weight.register_hook(lambda g: seen.update(tied=whole(g).clone()))
    model.first.bias.register_post_accumulate_grad_hook(
        lambda p: seen.update(bias=whole(p.grad).clone())
    )
    up.register_hook(lambda g: g * 0).remove()
    side.loss().backward()
    before, first = dict(sorted(seen.items())), {n: g.clone() for n, g in side.grads().items()}
    model.zero_grad()
    double.remove()
    up = model.blocks[0].up.weight
    up.register_hook(lambda g: 3 * g)
    up.register_post_accumulate_grad_hook(lambda p: seen.update(up=whole(p.grad).clone()))
    side.loss().backward()
    return before, first, dict(sorted(seen.items())), side.grads()


@habit(chain)
def a_step_in_the_backward(side: Side) -> Any:
    """An optimizer for each parameter, stepped by a hook as soon as its gradient is there."""
    for p in side.model.parameters():
        optimizer = torch.optim.SGD([p], lr=1e-1)

        def step(_: Any, optimizer: Any = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    losses = []
    for i in range(2):
        losses.append(side.loss(tokens(9, i)))
        losses[-1].backward()
    return [x.item() for x in losses], side.weights()


@habit(chain)
def module_hooks(side: Side) -> Any:
    model, seen = side.model, []
    model.first.register_full_backward_hook(
        lambda m, into, out: seen.append((into[0].clone(), out[0].clone()))
    )
    model.blocks[0].register_forward_hook(lambda m, args, out: 2 * out)
    model.norm.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    return trained(side, side.loss), seen


@habit(lambda: Regularized().double())
def parameters_beside_the_loss(side: Side) -> Any:
    loss, weight, spare = side.loss()
    (loss + weight.square().sum() + spare.pow(3).sum()).backward()
    return loss, weight, spare, side.grads()
