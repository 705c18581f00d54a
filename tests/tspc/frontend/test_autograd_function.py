"""`autograd.Function` in a model: its own backward, exact and folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import tspc
from tspc.backend.simulated import simulated_backend
from tspc.frontend import autograd_function

Tensor = torch.Tensor
WORDS, H = 11, 8
IDS = torch.arange(26).view(2, 13) % WORDS


class Round(Function):
    """Straight through, where it is not saturated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() < 1, g, 0.0)


class Clamp(Function):
    """The gradient is written in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        g = g.clone()
        g[x > 1] = 0
        g.mul_(2)
        return g


class Turn(Function):
    """Complex numbers from pairs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.view_as_complex(x.unflatten(-1, (-1, 2))) * 2j

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.view_as_real(g * -3j).flatten(-2)


class Reverse(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * g, None


class Product(Function):
    """Two results; a backward that is none of the forward's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        y = x @ w
        return y, y.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        g = g + h
        return 2 * (g @ w.T), x.flatten(0, 1).T @ g.flatten(0, 1)


class Injects(Function):
    """A gradient that is there without a cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, torch.ones_like(ctx.saved_tensors[0])


class Squares(Function):
    """Not linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * g


class Model(nn.Module):
    def __init__(self, end: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.end, self.table = end, nn.Embedding(WORDS, H)
        self.up, self.down, self.norm = nn.Linear(H, 12), nn.Linear(12, H), nn.LayerNorm(H)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.end(self, x + self.down(torch.tanh(self.up(self.norm(x)))))


def after(m: Any, x: Tensor) -> Tensor:
    return (Round.apply(x * 2) * x).mean()


def inside(m: Any, x: Tensor) -> Tensor:
    return m.down(Round.apply(m.up(x) * 2)).square().mean()


def clamped(m: Any, x: Tensor) -> Tensor:
    return m.down(Clamp.apply(m.up(x) * 2)).square().mean()


def turned(m: Any, x: Tensor) -> Tensor:
    y = Turn.apply(torch.tanh(m.up(x)))
    return m.down(torch.view_as_real(y * y + y).flatten(-2)).square().mean()


def checkpointed(m: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda y: inside(m, y), x, use_reentrant=False)


@torch.compiler.nested_compile_region
def twice(x: Tensor) -> Tensor:
    return Round.apply(x * 2) * x


def nested(m: Any, x: Tensor) -> Tensor:
    """Called more than once, it is a graph in the graph."""
    return (twice(x) + twice(torch.tanh(m.up(x))).mean(-1, keepdim=True)).square().mean()


def weights(m: Any, x: Tensor) -> Tensor:
    """A quantized weight."""
    return F.linear(torch.tanh(m.up(x)), Round.apply(m.down.weight * 3)).square().mean()


def reverse(m: Any, x: Tensor) -> Tensor:
    return m.down(torch.tanh(m.up(Reverse.apply(x, 0.5)))).square().mean()


def product(m: Any, x: Tensor) -> Tensor:
    y, total = Product.apply(x, m.up.weight.t())
    return (m.down(torch.sin(y)) + total).square().mean()


@pytest.mark.parametrize(
    "end,regions",
    [
        (after, 1),
        (inside, 2),
        (clamped, 2),
        (turned, 2),
        (checkpointed, 2),
        (nested, 2),
        (weights, 2),
        (reverse, 2),
        (product, 0),
    ],
)
def test_equals_one_device(end: Any, regions: int) -> None:
    torch.manual_seed(0)
    found = tspc.verify(Model(end).double(), (IDS,), {}, 3, {}, 1e-9)
    (graph,) = found.graphs
    assert len(graph.rewritten.choice.regions) == regions and not graph.rewritten.typed.fallbacks


def test_any_length_from_one_graph() -> None:
    torch.manual_seed(0)
    mine, one, made = Model(inside).double(), Model(inside).double(), []
    one.load_state_dict(mine.state_dict())
    torch._dynamo.reset()
    fn = torch.compile(mine, backend=simulated_backend(2, graphs=made), dynamic=True)
    for length in (5, 8, 11):
        for m, call in ((mine, fn), (one, one)):
            m.zero_grad()
            call(IDS[:, :length]).backward()
        for p, q in zip(mine.parameters(), one.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    assert len(made) == 1


REFUSED = {
    "adds to what the cotangents make": lambda m, x: Injects.apply(x, x.sum()).mean(),
    "is not linear in the cotangents": lambda m, x: Squares.apply(x).mean(),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_backward_that_is_not_linear(why: str) -> None:
    model = Model(REFUSED[why])
    where = r"test_autograd_function.py:\d+: the backward of an autograd.Function"
    with pytest.raises(Exception, match=f"{where} {why}"):
        tspc.plan(model, (IDS,), ranks=2)
    with torch.no_grad():  # its forward alone is nothing special
        tspc.verify(model.double(), (IDS,), {}, 2, {}, 1e-9)


class Doubles(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def test_under_vmap() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: torch.vmap(Doubles.apply)(x).square().mean()).double()
    tspc.verify(model, (IDS,), {}, 2, {}, 1e-9)


def test_what_can_have_a_gradient() -> None:
    kinds = (torch.float32, torch.complex64, torch.int64, torch.bool)
    numbers = [autograd_function._is_number(torch.ones(2, dtype=t)) for t in kinds]
    assert numbers == [True, True, False, False] and not autograd_function._holds_numbers(3)
