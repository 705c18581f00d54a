"""Sequences that ops lay together of other dims, and two in one program; all equal one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import tspc
from tspc.passes.lower.unit import Unit

pytestmark = [pytest.mark.slow, pytest.mark.sampled(4)]
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
        self.patches = nn.Conv2d(3, HIDDEN, 2, 2, padding="valid" if after else 0)
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


def run(model: nn.Module, *args: Tensor, ranks: int, **options: Any) -> Unit:
    """Verify on simulated ranks in float64; the one graph that was made."""
    found = tspc.verify(model.double(), args, {}, ranks, options, 1e-11)
    (graph,) = found.graphs
    return graph.rewritten


def folded(r: Unit) -> list[str]:
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


class Cross(Block):
    """A block whose queries are of x, keys of another sequence."""

    def forward(self, x: Tensor, other: Tensor, causal: bool = False) -> Tensor:
        q = self.q(self.norm1(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (m(other).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Causal(Cross):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, True)


class EncoderDecoder(nn.Module):
    """Words of two languages; causal says whether the queries of the second see later words of the
    first."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.words, self.causal = nn.Embedding(17, HIDDEN), causal
        self.encoder, self.decoder, self.cross = Block(), Causal(), Cross()
        self.head = nn.Linear(HIDDEN, 17)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = self.encoder(self.words(source))
        x = self.cross(self.decoder(self.words(target)), states, self.causal)
        logits = self.head(x)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())
        return loss + states.pow(2).mean(), logits, states


def words(*lengths: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randint(0, 17, (2, n)) for n in lengths]


TWO = [
    (2, (7, 10), {}),
    (3, (11, 8), {"schedule": "stationary"}),
    (4, (3, 9), {"outputs": "full"}),
    (2, (6, 6), {"schedule": "gather", "layout": "zigzag"}),
    (3, (8, 5), {"schedule": "stationary", "layout": "zigzag", "memory_budget": "min"}),
    (2, (5, 12), {"schedule": "ring", "layout": "contiguous"}),
]


@pytest.mark.parametrize(("ranks", "lengths", "options"), TWO)
def test_two_sequences_of_their_own_length(ranks, lengths, options) -> None:
    r = run(EncoderDecoder(), *words(*lengths), ranks=ranks, **options)
    assert len(r.choice.leaves) == 2 and not r.typed.fallbacks
    if "layout" not in options:
        assert sorted(r.choice.leaves.values()) == ["contiguous", "zigzag"]
    assert not r.choice.refused
    assert len(r.choice.regions) == 7


def test_a_causal_attention_to_another_sequence_is_gathered() -> None:
    r = run(EncoderDecoder(causal=True), *words(7, 9), ranks=2)
    assert {f.op.split(".")[1] for f in r.typed.fallbacks} == {"scaled_dot_product_attention"}


class Latents(nn.Module):
    """Learned queries, which nothing attends to, read what is given with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 5, HIDDEN))
        self.first, self.second, self.head = Cross(), Cross(), nn.Linear(HIDDEN, 3)

    def forward(self, given: Tensor) -> Tensor:
        x = self.first(self.latents.expand(len(given), -1, -1), given)
        return self.head(self.second(x, given)[:, -1]).pow(2).mean()


def test_queries_that_nothing_attends_to_are_a_sequence() -> None:
    given = torch.randn(2, 9, HIDDEN, dtype=torch.float64, requires_grad=True)
    r = run(Latents(), given, ranks=3)
    assert len(r.choice.leaves) == 2 and not r.typed.fallbacks
    assert len(folded(r)) == 4, r.choice.refused


class Meeting(nn.Module):
    """Two sequences that meet outside of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.one, self.two = nn.Embedding(17, HIDDEN), Block(), Block()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x, y = self.one(self.words(a)), self.two(self.words(b))
        joined = torch.cat([x, y], 1).cumsum(1)
        return (joined.mean(1) * (x @ y.transpose(1, 2)).mean()).pow(2).sum()


def test_two_sequences_that_meet() -> None:
    r = run(Meeting(), *words(7, 9), ranks=2)
    assert [f.op.split(".")[1] for f in r.typed.fallbacks] == ["cat"]


def distances(x: Tensor) -> Tensor:
    at = torch.arange(x.shape[1], device=x.device)
    return (at[None] - at[:, None]).clamp(-3, 3) + 3


class Relative(nn.Module):
    """A table of biases by distance, for each head or (heads = 1) for all."""

    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.table = nn.Embedding(7, heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(distances(x)).permute(2, 0, 1)[None]


class Slopes(nn.Module):
    """Learned slopes; the future has no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        later = at[None] > at[:, None]
        return (self.slopes * (at[None] - at[:, None])).masked_fill(later, -torch.inf)[None]


class OfKeys(nn.Module):
    """A bias that each token has as a key, computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x).transpose(1, 2)[:, None]


class OfQueries(nn.Module):
    """Biases of a fixed number of heads computed from the queries' tokens, for all keys but one."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(HIDDEN, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.arange(x.shape[1], device=x.device) == 0
        return self.score(x).transpose(1, 2)[..., None] * first


class Biased(nn.Module):
    """Two layers of attention with one bias."""

    def __init__(self, bias: nn.Module) -> None:
        super().__init__()
        self.words, self.bias, self.layers = nn.Embedding(17, HIDDEN), bias, nn.ModuleList()
        self.layers.extend(Block() for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        mask = self.bias(x)
        for m in self.layers:
            h = m.norm1(x)
            q, k, v = (w(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (m.q, m.k, m.v))
            x = x + m.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x.pow(2).mean()


# bias, ranks, length, options, attentions that are folded
BIASES = [
    (Relative, 2, 9, {}, 2),
    (Relative, 4, 5, {"schedule": "stationary", "layout": "zigzag"}, 2),
    (Relative, 3, 7, {"schedule": "gather"}, 2),
    (lambda: Relative(1), 3, 8, {}, 2),
    (Slopes, 2, 7, {"layout": "zigzag"}, 2),
    (OfKeys, 3, 8, {}, 0),
    (OfQueries, 2, 7, {}, 2),
]


@pytest.mark.parametrize(("bias", "ranks", "length", "options", "count"), BIASES)
def test_biases_with_a_gradient(bias, ranks, length, options, count) -> None:
    torch.manual_seed(0)
    r = run(Biased(bias()), *words(length), ranks=ranks, **options)
    assert not r.typed.fallbacks
    attentions = [b for b in r.bodies.values() if b.attentions]
    assert len(attentions) == count, r.choice.refused
    whole = [n for n in r.typed.program.nodes if n.op == "whole"]
    assert bool(whole) == (bias is OfKeys)
