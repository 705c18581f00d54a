"""Sequences that ops lay together of other dims; all equal one device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tspc.passes.pipeline import Rewritten

import tspc

pytestmark = pytest.mark.slow
HIDDEN, HEADS = 12, 3


class Block(nn.Module):
    """Attention and an MLP, with norms before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, 20), nn.Linear(20, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            m(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Images(nn.Module):
    """Patches of images, with `extra` learned tokens before and one after; positions are learned.

    pool: what the head reads.
    """

    def __init__(self, side: int, extra: int, after: bool, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.patches = nn.Conv2d(3, HIDDEN, 2, 2)
        self.first = nn.Parameter(torch.randn(1, extra, HIDDEN)) if extra else None
        self.last = nn.Parameter(torch.randn(1, 1, HIDDEN)) if after else None
        count = side**2 + extra + after
        self.positions = nn.Parameter(torch.randn(1, count, HIDDEN)) if count % 2 else None
        self.block, self.head, self.pool = Block(), nn.Linear(HIDDEN, 5), pool

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        ends = [None if e is None else e.expand(len(x), -1, -1) for e in (self.first, self.last)]
        parts = [e for e in (ends[0], x, ends[1]) if e is not None]
        x = torch.cat(parts, 1) if len(parts) > 1 else x
        x = self.block(x if self.positions is None else x + self.positions)
        return F.cross_entropy(self.head(self.pool(x)), labels)


def class_token(x: Tensor) -> Tensor:
    return x[:, 0]


def last_token(x: Tensor) -> Tensor:
    return x[:, -1]


def mean(x: Tensor) -> Tensor:
    return x.mean(1)


def mean_of_patches(x: Tensor) -> Tensor:
    return x[:, 1:].mean(1)


def both(x: Tensor) -> Tensor:
    return x[:, 0] + x[:, 1:].mean(dim=1)


def run(model: nn.Module, *args: Tensor, ranks: int) -> Rewritten:
    """Verify on simulated ranks in float64; the one graph that was made."""
    found = tspc.verify(model.double(), args, {}, ranks=ranks, tolerance=1e-11)
    (graph,) = found.graphs
    return graph.rewritten


def folded(r: Rewritten) -> list[str]:
    return sorted(name for name, _, _ in r.choice.regions)


IMAGES = [
    (3, 1, False, class_token, 2),
    (2, 1, False, class_token, 4),
    (3, 0, False, mean, 3),
    (3, 5, False, both, 4),
    (4, 0, True, last_token, 3),
    (2, 1, True, mean_of_patches, 2),
]


@pytest.mark.parametrize(("side", "extra", "after", "pool", "ranks"), IMAGES)
def test_patches_and_learned_tokens_are_one_sequence(side, extra, after, pool, ranks):
    torch.manual_seed(0)
    model = Images(side, extra, after, pool)
    pixels = torch.randn(2, 3, 2 * side, 2 * side, dtype=torch.float64)
    r = run(model, pixels, torch.tensor([1, 4]), ranks=ranks)
    assert len(folded(r)) == 2, r.choice.refused
    made = {f.why for f in r.typed.fallbacks}
    assert made == {"it lays the sequence together"}, r.typed.fallbacks
    assert len(r.typed.fallbacks) == 1


class Prefixed(nn.Module):
    """Learned tokens before those of a text of any length; the loss is of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(17, HIDDEN)
        self.prefix = nn.Parameter(torch.randn(1, 3, HIDDEN))
        self.block, self.head = Block(), nn.Linear(HIDDEN, 17)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.prefix.expand(len(tokens), -1, -1), self.words(tokens)], 1)
        logits = self.head(self.block(x))[:, 3:]
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize(("length", "ranks"), [(6, 2), (8, 3)])
def test_a_prefix_of_a_text(length: int, ranks: int) -> None:
    torch.manual_seed(0)
    r = run(Prefixed(), torch.randint(0, 17, (2, length)), ranks=ranks)
    assert len(folded(r)) == 3, r.choice.refused
    assert {f.why for f in r.typed.fallbacks} == {"it lays the sequence together"}


class Grid(nn.Module):
    """Tokens given in a row, pooled as a grid: their number is a product, which is not of one
    factor where they attend."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.head = Block(), Block(), nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.first(x).unflatten(1, (3, -1))
        x = self.block((grid + grid.cumsum(1)).flatten(1, 2) + x)
        return self.head(x).pow(2).mean()


@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_along_two_factors_is_gathered(ranks: int) -> None:
    torch.manual_seed(0)
    r = run(Grid(), torch.randn(2, 12, HIDDEN, dtype=torch.float64), ranks=ranks)
    assert "scaled_dot_product_attention" in {f.op.split(".")[1] for f in r.typed.fallbacks}
