"""Models whose weights are fused in unequal parts equal one device, forward and every gradient, and
fold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import tspc
from examples.llama_like import LlamaLike
from tspc.ir.program import APART
from tspc.passes.lower.unit import Unit

pytestmark = pytest.mark.sampled(2)

VOCABULARY, WIDTH, HEADS, DIM = 23, 12, 5, 4


class Fused(nn.Module):
    """All queries and one K/V head in one weight, apart by `split`; biases."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2) * DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).split([HEADS * DIM, DIM, DIM], -1)
        return q.unflatten(-1, (HEADS, DIM)).transpose(1, 2), k.unsqueeze(1), v.unsqueeze(1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        q, k, v = self.apart(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


class FusedByHeads(Fused):
    """The same apart by slices of heads, queries last; K is normalised."""

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        every = self.qkv(x).unflatten(-1, (HEADS + 2, DIM)).transpose(1, 2)
        k, v, q = every[:, :1], every[:, 1:2], every[:, 2:]
        return q, F.normalize(k, dim=-1), v


class FusedAndCached(Fused):
    """K and V are handed out: one before it attends, one as the weight made it."""

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unsqueeze(1).split([HEADS * DIM, DIM, DIM], -1)
        self.cache = (k, v)
        return q.squeeze(1).unflatten(-1, (HEADS, DIM)).transpose(1, 2), k, v

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        loss = super().forward(tokens)
        return loss, *self.cache


class Experts(nn.Module):
    """Softmax, the two best of four experts per token, their weights by `index_select`; a loss that
    balances them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.router = nn.Linear(WIDTH, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, WIDTH, 10) / 3)
        self.down = nn.Parameter(torch.randn(4, 10, WIDTH) / 3)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        flat = x.flatten(0, 1)
        share = F.softmax(self.router(flat), -1)
        best, chosen = share.topk(2, -1)
        every = torch.zeros_like(share).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
        y = torch.zeros_like(flat)
        for k in range(2):
            up, down = (w.index_select(0, chosen[:, k]) for w in (self.up, self.down))
            made = torch.bmm(F.silu(torch.bmm(flat.unsqueeze(1), up)), down).squeeze(1)
            y = y + made * every.gather(-1, chosen[:, k : k + 1])
        x = x + y.view_as(x)
        balance = (F.one_hot(chosen, 4).sum(1).double() * share).mean()
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten()) + balance


def run(make: Callable[[], nn.Module], ranks: int, schedule: str = "auto") -> Unit:
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (2, 13))
    options = {"schedule": schedule}
    found = tspc.verify(make().double(), (tokens,), {}, ranks, options, 1e-9)
    assert found.errors["gradient of"]
    (graph,) = found.graphs
    return graph.rewritten


@pytest.mark.parametrize("schedule", ["auto", "stationary", "gather"])
@pytest.mark.parametrize("make", [Fused, FusedByHeads, FusedAndCached])
def test_one_key_head_in_the_weight_of_the_queries(
    make: Callable[[], nn.Module], schedule: str
) -> None:
    rewritten = run(make, 3, schedule)
    assert {n.kwargs["fold"].name for n in rewritten.folds} == {"model", "head"}
    assert not rewritten.typed.fallbacks
    (apart,) = (n for n in rewritten.typed.program.nodes if n.op == APART)
    (body,) = (b for b in rewritten.bodies.values() if b.attentions)
    (attention,) = body.attentions
    exchanged_once = {t.name for t in body.tokens}
    assert len(apart.types) == 2 and {attention.operands.k, attention.operands.v} <= exchanged_once


@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_of_a_cut_sequence(ranks: int) -> None:
    rewritten = run(Experts, ranks)
    assert {n.kwargs["fold"].name for n in rewritten.folds} == {"head"}
    assert not rewritten.typed.fallbacks and not rewritten.analysis.fallbacks
    kinds = {n: s.kind for n, s in rewritten.choice.storages.items()}
    assert kinds["up"] == kinds["down"] == "gather"


@pytest.mark.parametrize("heads,kv_heads,ranks", [(8, 2, 4), (6, 2, 3)])
def test_key_heads_fewer_than_ranks(heads: int, kv_heads: int, ranks: int) -> None:
    """The queries of each K/V head are cut in their stead: no rank holds a pad, and K and V are
    exchanged once."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (2, 13))
    model = LlamaLike(layers=1, heads=heads, kv_heads=kv_heads).double()
    found = tspc.verify(model, (tokens, tokens), {}, ranks, {}, 1e-9)
    rewritten = found.graphs[0].rewritten
    (body,) = (b for b in rewritten.bodies.values() if b.attentions)
    assert body.size == body.units * ranks == heads // kv_heads
    (attention,) = body.attentions
    assert {attention.operands.k, attention.operands.v} <= {t.name for t in body.tokens}


class Gated(nn.Module):
    """An MLP whose columns are scaled by what is computed of weights alone; `also` makes something
    more of the weights that goes into the loss or out."""

    def __init__(self, also: Callable[[Gated, Tensor], Tensor]) -> None:
        super().__init__()
        self.also = also
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.scale = nn.Parameter(torch.randn(20))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(tokens)
        gate = self.scale.exp() * self.up.bias.tanh()
        y = x + self.down(F.gelu(self.up(x) * gate))
        return y.square().mean(), self.also(self, gate)


WEIGHTS_ALONE: dict[str, tuple[Callable[[Gated, Tensor], Tensor], bool]] = {
    "nothing": (lambda m, gate: m.words.weight.sum(), True),
    "returned": (lambda m, gate: gate, False),
    "summed": (lambda m, gate: gate.square().sum(), False),
    "decay": (lambda m, gate: m.up.weight.square().sum(), False),
    "view": (lambda m, gate: m.up.weight.t(), False),
}


@pytest.mark.parametrize("also", WEIGHTS_ALONE)
def test_values_of_weights_alone(also: str) -> None:
    """They stay in a fold, which is made only where none of them leaves it."""
    fn, folds = WEIGHTS_ALONE[also]
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, 11))
    found = tspc.verify(Gated(fn).double(), (tokens,), {}, 3, {}, 1e-9)
    (graph,) = found.graphs
    assert bool(graph.rewritten.choice.regions) == folds
