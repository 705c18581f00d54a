"""Optimizers made before the first call: three steps of each are those of one device. The table in
docs/optimizers.md lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import optim

from tests.parity.habits import Side, habit, tokens
from tests.parity.habits.breaks import chain


class Momentum(optim.Optimizer):
    """One's own, its state made by the shape alone."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in (p for group in self.param_groups for p in group["params"]):
            if not self.state[p]:
                self.state[p]["sum"] = torch.zeros(p.shape, dtype=p.dtype)
            self.state[p]["sum"].mul_(0.9).add_(p.grad)
            p.add_(self.state[p]["sum"], alpha=-0.1)


class Whitened(optim.Optimizer):
    """One's own, its updates made of whole matrices."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in (p for group in self.param_groups for p in group["params"]):
            x = p.grad / (p.grad.norm() + 1e-7)
            x = x.T if p.shape[0] > p.shape[1] else x
            for _ in range(3):
                x = 1.5 * x - 0.5 * (x @ x.T) @ x
            p.add_(x.T if p.shape[0] > p.shape[1] else x, alpha=-0.02)


def transformers_adafactor(params: Any) -> optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(params, scale_parameter=True, relative_step=True, warmup_init=True)


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: optim.Adam(p, lr=1e-2, amsgrad=True, foreach=True),
    "AdamW": lambda p: optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW fused": lambda p: optim.AdamW(p, lr=1e-2, fused=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=1e-2),
    "Adagrad fused": lambda p: optim.Adagrad(p, lr=1e-2, fused=True),
    "Adadelta": lambda p: optim.Adadelta(p),
    "Adamax": lambda p: optim.Adamax(p, lr=1e-2),
    "NAdam": lambda p: optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: optim.RAdam(p, lr=1e-2),
    "ASGD": lambda p: optim.ASGD(p, lr=1e-2),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "Rprop": lambda p: optim.Rprop(p, lr=1e-2),
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.1, max_iter=2, line_search_fn="strong_wolfe"),
    "Adafactor": lambda p: optim.Adafactor(p, lr=1e-2),
    "Muon": lambda p: optim.Muon(p, lr=1e-2),
    "Adafactor of transformers": transformers_adafactor,
    "one's own, elementwise": Momentum,
    "one's own, of whole matrices": Whitened,
}
OF_MATRICES = ("Muon", "one's own, of whole matrices")


def _given(model: nn.Module, name: str) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 2 or name not in OF_MATRICES]


@habit(chain)
def each_optimizer(side: Side) -> Any:
    model = side.model
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    made = {n: make(_given(model, n)) for n, make in OPTIMIZERS.items()}
    side.loss()
    out = {}
    for name, optimizer in made.items():
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(start[n])

        def closure(step: int, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = side.loss(tokens(9, step))
            loss.backward()
            return loss

        for step in range(3):
            if name == "LBFGS":
                optimizer.step(lambda step=step: closure(step))
            else:
                closure(step)
                optimizer.step()
        out[name] = side.weights()
    return out


@habit(chain, raises=(Exception, "SparseAdam takes sparse gradients"))
def sparse_adam(side: Side) -> Any:
    optimizer = torch.optim.SparseAdam(side.model.parameters())
    side.loss()
    return optimizer
