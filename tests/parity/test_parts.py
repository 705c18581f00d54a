"""Parts of models beside the usual regions equal one device, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import tspc
from tests.parity.test_shapes import HEADS, MLP, VOCABULARY, WIDTH, Base
from tspc.backend.simulated import Simulated
from tspc.ir.layout import Layout, Span
from tspc.ir.spec import AttentionSpec, Operands
from tspc.runtime.attention import kernels as attention


def run(make: type[Base], ranks: int = 3) -> Simulated:
    torch.manual_seed(0)
    model = make().double()
    tokens = torch.randint(0, VOCABULARY, (2, 13))
    (graph,) = tspc.verify(model, (tokens,), {}, ranks, {}, 1e-9).graphs
    return graph


def folds(graph: Simulated) -> set[str]:
    return {n.kwargs["fold"].name for n in graph.rewritten.folds}


class Mixture(Base):
    """Two experts, each token a weighted sum of both: the weights are slices of size one."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.other = nn.Linear(WIDTH, 2), MLP()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        p = self.router(x).softmax(-1)
        x = x + p[..., :1] * self.mlp(x) + p[..., 1:] * self.other(x)
        return self.loss(self.head(x), tokens)


def test_a_mixture() -> None:
    assert folds(run(Mixture)) == {"mlp", "other", "head"}


class LearnedBias(Base):
    """What attention adds to its scores is looked up by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Embedding(7, HEADS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        at = torch.arange(x.shape[1])
        distance = at[:, None] - at[None, :]
        bias = self.bias(distance.clamp(-3, 3) + 3).permute(2, 0, 1)[None]
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.into(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, bias.masked_fill(distance < 0, -torch.inf))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.loss(self.head(x + self.mlp(x)), tokens)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_mask_with_a_gradient(ranks: int) -> None:
    graph = run(LearnedBias, ranks)
    assert folds(graph) == {"mlp", "head", "model"}
    assert not graph.rewritten.typed.fallbacks


def test_unfused_attention_rounds_as_one_device_does() -> None:
    """Values of another width than keys, in bfloat16: scores and weights are not rounded."""
    errors: dict[str, list[float]] = {"mine": [], "one": []}
    for seed in range(4):
        torch.manual_seed(seed)
        given = [torch.randn(2, 4, 24, n).bfloat16() for n in (8, 8, 10)]
        g = torch.randn(2, 4, 24, 10).bfloat16()
        span, x = Span(Layout(1), 24, 24), Operands(*given)
        meeting = attention.Meeting(AttentionSpec(), span, span)
        out, lse = attention.attend(x, meeting, [0])
        grads = attention.attend_backward(g, x, (out, lse), meeting, [0])
        found = {"mine": [out, *grads]}
        for kind, dtype in (("one", torch.bfloat16), ("exact", torch.float64)):
            leaves = [x.to(dtype).requires_grad_() for x in given]
            y = F.scaled_dot_product_attention(*leaves)
            found[kind] = [y.detach(), *torch.autograd.grad(y, leaves, g.to(dtype))]
        for kind, seen in errors.items():
            for a, b in zip(found[kind], found["exact"]):
                seen.append(float((a.bfloat16().double() - b).norm() / b.norm()))
    assert sum(errors["mine"]) <= 1.3 * sum(errors["one"])
