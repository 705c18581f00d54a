"""What cannot be done is a `TspcError` on every rank, that the script can catch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

import tspc
from tests.parity.habits import Side, habit, tokens


class Square(nn.Module):
    """[batch, sequence, 8] -> a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))).square().mean()


class Renormed(nn.Module):
    """An op without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.renorm(x @ self.weight, 2, 0, 1.0).sum()


def square() -> nn.Module:
    return Square().double()


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(seed)).double()


TWICE = "was differentiated again (create_graph=True)"


@habit(square, raises=(tspc.UnsupportedError, TWICE))
def a_penalty_of_the_gradients(side: Side) -> None:
    grads = torch.autograd.grad(side.call(rows()), list(side.model.parameters()), create_graph=True)
    sum(g.pow(2).sum() for g in grads).backward()


@habit(square, raises=(tspc.UnsupportedError, TWICE))
def a_penalty_of_the_inputs_gradient(side: Side) -> None:
    x = rows().requires_grad_()
    (g,) = torch.autograd.grad(side.call(x), x, create_graph=True)
    (g.norm() - 1).square().backward()


@habit(square)
def create_graph_without_a_second_backward(side: Side) -> Any:
    x = rows().requires_grad_()
    (g,) = torch.autograd.grad(side.call(x), x, create_graph=True)
    return g.detach()


@habit(square)
def two_backwards_of_a_kept_graph(side: Side) -> Any:
    x = rows().requires_grad_()
    loss = side.call(x)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    return x.grad, side.grads()


@habit(lambda: Renormed().double(), {"strict": True}, (tspc.UnsupportedError, "strict=False"))
def strict(side: Side) -> None:
    side.call(rows())


@habit(options={"layout": "spiral"}, raises=(tspc.OptionError, "layout='spiral'; valid"))
def a_bad_option(side: Side) -> None:
    side.loss()


@habit()
def caught_and_compiled_otherwise(side: Side) -> Any:
    """A script that tries one thing and then another."""
    if side.compiled:
        options = {"mesh": None, "strict": True, "schedule": "fastest"}
        try:
            torch.compile(side.model, backend="tsp", options=options)(tokens(), tokens())
        except tspc.TspcError as e:
            assert type(e) is tspc.OptionError and "schedule='fastest'" in str(e)
        else:
            raise AssertionError("nothing was raised")
    side.loss().backward()
    return side.grads()


@habit(raises=(tspc.OptionError, "works on one rank only"))
def a_mode_of_inductor(side: Side) -> None:
    torch.compile(side.model, backend="tsp", mode="max-autotune")(tokens(), tokens())
