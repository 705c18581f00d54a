"""Models of one region each, in float64: on ranks they take a tenth of a second."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import tspc
from tspc.backend.simulated import Simulated

WIDTH, LENGTH = 6, 7


class Mlp(nn.Module):
    """One region; five units and a bias on either side."""

    def __init__(self, units: int = 5) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, units), nn.Linear(units, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))).softmax(-1).square().mean()


class Attention(nn.Module):
    """heads of queries, fewer or as many of keys."""

    def __init__(self, heads: int = 3, kv: int = 3, dim: int = 4, sinks: bool = False) -> None:
        super().__init__()
        self.heads, self.kv, self.dim = heads, kv, dim
        self.q, self.o = nn.Linear(WIDTH, heads * dim), nn.Linear(heads * dim, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv * dim), nn.Linear(WIDTH, kv * dim)
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for y in (self.q(x), self.k(x), self.v(x))
        )
        if self.sinks is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            scores = q @ k.transpose(-1, -2) / self.dim**0.5
            column = self.sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            y = torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v
        return self.o(y.transpose(1, 2).flatten(2)).softmax(-1).square().mean()


class Head(nn.Module):
    """A vocabulary: a log-sum-exp over the shards."""

    def __init__(self, words: int = 11) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        labels = torch.arange(x.shape[0] * x.shape[1]) % 11
        return F.cross_entropy(self.out(x).flatten(0, 1), labels)


class Cached(Mlp):
    """What is inside of the region is handed out too."""

    def forward(self, x: Tensor) -> Any:
        inner = torch.tanh(self.up(x))
        return self.down(inner).softmax(-1).square().mean(), inner


def tokens(length: int = LENGTH) -> Tensor:
    draw = torch.Generator().manual_seed(length)
    return torch.randn(2, length, WIDTH, generator=draw, dtype=torch.float64)


def proved(
    model: nn.Module, ranks: int = 3, length: int = LENGTH, **options: Any
) -> list[Simulated]:
    """The graphs of a model that on ranks is what it is on one device, gradients included."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    return tspc.verify(model.double(), (tokens(length),), {}, ranks, options, 1e-10).graphs
