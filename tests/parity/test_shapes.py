"""Hand-written models of unusual shape equal one device, forward and every gradient, and what is
folded of them is what should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import tspc
from tspc.explain.report import reports
from tspc.passes.lower.unit import Unit

pytestmark = [pytest.mark.slow, pytest.mark.sampled(3)]

VOCABULARY, WIDTH, HEADS, HIDDEN = 23, 12, 3, 14
Tensors = tuple[Tensor, ...]


class Base(nn.Module):
    """Two embeddings and a head: what the shapes have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(64, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.mlp = MLP()

    def stem(self, tokens: Tensor) -> Tensor:
        at = torch.arange(tokens.shape[1], device=tokens.device)
        return self.words(tokens) + self.places(at)

    def loss(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class MLP(nn.Module):
    def __init__(self, out: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Attention(nn.Module):
    """causal: each token sees those before it. memory: what keys and values are made of."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = (
            w(t).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for w, t in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(y.transpose(1, 2).flatten(2))


class NoNorms(Base):
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        return self.loss(self.head(x + self.mlp(x)), tokens)


class NormBeforeTheMLPOnly(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.stem(tokens))
        return self.loss(self.head(x + self.mlp(x)), tokens)


class NoNormsWithAttention(Base):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        x = x + self.attention(x)
        return self.loss(self.head(x + self.mlp(x)), tokens)


class PostNorm(NoNormsWithAttention):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        x = self.first(x + self.attention(x))
        x = self.second(x + self.mlp(x))
        return self.loss(self.head(x), tokens)


class Parallel(NoNormsWithAttention):
    """Attention and MLP read the same norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        y = self.norm(x)
        return self.loss(self.head(x + self.attention(y) + self.mlp(y)), tokens)


class TwoHeads(Base):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, 17)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        x = x + self.mlp(x)
        other = F.cross_entropy(self.other(x).flatten(0, 1), tokens.flatten() % 17)
        return self.loss(self.head(x), tokens) + 0.5 * other


class ResidualAroundTheHead(Base):
    """The head's logits are added to others."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        return self.loss(self.short(x) + self.head(x + self.mlp(x)), tokens)


class UsedInsideAndOutside(Base):
    """The hidden values of an MLP leave it."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        h = F.gelu(self.mlp.up(x))
        x = x + self.mlp.down(h) * h.pow(2).amax(-1, keepdim=True)
        return self.loss(self.head(x), tokens)


class UsedByTwo(Base):
    """The hidden values of an MLP feed two products."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(HIDDEN, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        h = F.gelu(self.mlp.up(x))
        x = x + self.mlp.down(h) * torch.sigmoid(self.second(h))
        return self.loss(self.head(x), tokens)


class SharedTwice(Base):
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        x = x + self.mlp(x)
        return self.loss(self.head(x + self.mlp(x)), tokens)


class LinearChain(Base):
    def __init__(self) -> None:
        super().__init__()
        sizes = (WIDTH, HIDDEN, 10, HIDDEN, WIDTH)
        self.chain = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.loss(self.head(self.chain(self.stem(tokens))), tokens)


class SquareChain(Base):
    """Every width alike."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.loss(self.head(self.chain(self.stem(tokens))), tokens)


class Gated(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        x = x * torch.sigmoid(self.gate(x))
        return self.loss(self.head(x + self.mlp(x)), tokens)


class LowRank(Base):
    """Frozen weights with low-rank ones beside them."""

    def __init__(self) -> None:
        super().__init__()
        for p in self.mlp.parameters():
            p.requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, HIDDEN, bias=False)
        self.c, self.d = nn.Linear(HIDDEN, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        h = F.gelu(self.mlp.up(x) + 2.0 * self.b(self.a(x)))
        y = self.mlp.down(h) + 2.0 * self.d(self.c(h))
        return self.loss(self.head(x + y), tokens)


class Bilinear(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.c = nn.Linear(HIDDEN, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        return self.loss(self.head(x + self.c(self.a(x) * self.b(x))), tokens)


class WeightNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.mlp.up = nn.utils.parametrizations.weight_norm(self.mlp.up)
        self.mlp.down = nn.utils.parametrizations.weight_norm(self.mlp.down)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        return self.loss(self.head(x + self.mlp(x)), tokens)


class TiedUp(Base):
    """One weight makes the hidden values and sums them."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        w = self.mlp.up.weight
        return self.loss(self.head(x + F.relu(x @ w.t()) @ w), tokens)


class TiedTable(Base):
    """The head is the table of the words; a chain before it makes its columns a region."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.loss(self.head(self.mlp(self.stem(tokens))), tokens)


class ATableOfTheLength(Base):
    """Positions for exactly the tokens that come."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(13, WIDTH))

    def stem(self, tokens: Tensor) -> Tensor:
        return self.words(tokens) + self.table[: tokens.shape[1]]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        return self.loss(self.head(x + self.mlp(x)), tokens)


class ALongerTable(ATableOfTheLength):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, WIDTH))


class ConvStem(NoNormsWithAttention):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.stem(tokens).transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x)
        return self.loss(self.head(x + self.mlp(x)), tokens)


class Encoder(Base):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(causal=False)
        self.norm = nn.LayerNorm(WIDTH)

    def encode(self, tokens: Tensor) -> Tensor:
        x = self.stem(tokens)
        x = x + self.attention(x)
        return self.norm(x + self.mlp(x))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.loss(self.head(self.encode(tokens)), tokens)


class Pooled(Encoder):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.encode(tokens).mean(1)), tokens[:, 0])


class FirstToken(Encoder):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.encode(tokens)[:, 0]), tokens[:, 0])


class CrossAttention(Encoder):
    """A decoder on a memory of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = Attention(), Attention(causal=False)
        self.last = MLP()

    def forward(self, source: Tensor, tokens: Tensor) -> Tensor:
        memory = self.encode(source)
        x = self.stem(tokens)
        x = x + self.own(x)
        x = x + self.cross(x, memory)
        return self.loss(self.head(x + self.last(x)), tokens)


# model -> the regions that are folded of it, the ops that run replicated
CASES: dict[Callable[[], nn.Module], tuple[set[str], set[str]]] = {
    NoNorms: ({"mlp", "head"}, set()),
    NormBeforeTheMLPOnly: ({"mlp", "head"}, set()),
    NoNormsWithAttention: ({"attention", "mlp", "head"}, set()),
    PostNorm: ({"attention", "mlp", "head"}, set()),
    Parallel: ({"attention", "mlp", "head"}, set()),
    TwoHeads: ({"mlp", "other", "head"}, set()),
    ResidualAroundTheHead: ({"mlp", "model"}, set()),
    UsedInsideAndOutside: ({"head"}, set()),
    UsedByTwo: ({"model", "head"}, set()),
    SharedTwice: ({"mlp", "mlp#2", "head"}, set()),
    LinearChain: ({"chain", "model"}, set()),
    SquareChain: ({"chain", "model"}, set()),
    Gated: ({"mlp", "head"}, set()),
    LowRank: ({"model", "head"}, set()),
    Bilinear: ({"model", "head"}, set()),
    WeightNorm: ({"head"}, set()),
    TiedUp: ({"mlp.up", "head"}, set()),
    TiedTable: ({"mlp", "words"}, set()),
    ATableOfTheLength: ({"mlp", "head"}, set()),
    ALongerTable: ({"mlp", "head"}, set()),
    ConvStem: ({"attention", "mlp", "head"}, set()),
    Encoder: ({"attention", "mlp", "head"}, set()),
    Pooled: ({"attention", "mlp"}, set()),
    FirstToken: ({"attention", "mlp"}, set()),
    CrossAttention: ({"attention", "mlp", "own", "cross", "last", "head"}, set()),
}
LENGTHS: dict[object, tuple[int, ...]] = {CrossAttention: (9, 13)}


def run(make: Callable[[], nn.Module], ranks: int) -> Unit:
    torch.manual_seed(0)
    model = make().double()
    args = tuple(torch.randint(0, VOCABULARY, (2, n)) for n in LENGTHS.get(make, (13,)))
    found = tspc.verify(model, args, {}, ranks, {}, 1e-9)
    assert found.errors["gradient of"]
    (graph,) = found.graphs
    return graph.rewritten


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("make", CASES, ids=lambda m: m.__name__)
def test_equals_one_device(make: Callable[[], nn.Module], ranks: int) -> None:
    folds, replicated = CASES[make]
    rewritten = run(make, ranks)
    assert {n.kwargs["fold"].name for n in rewritten.folds} == folds
    assert {f.op.split(".")[1] for f in rewritten.typed.fallbacks} == replicated


class NoSequence(Base):
    """One vector: no dim of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x).sum()


def test_a_graph_without_a_sequence_is_reported() -> None:
    rewritten = tspc.plan(NoSequence().double(), (torch.randn(WIDTH).double(),), ranks=2).rewritten
    assert rewritten.choice.leaf is None and not rewritten.folds
    (line,) = reports(rewritten)
    assert "no dim of this graph is a sequence" in line.what and "mlp.down.weight" in line.what
