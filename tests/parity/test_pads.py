"""Pads and the sequence: what sums, moves or normalises over tokens, heads and words equals one
device where nothing divides, and what runs replicated is reported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import tspc
from tests.support.wide import each_once
from tspc.passes.lower.unit import Unit

pytestmark = [pytest.mark.slow, pytest.mark.sampled(4)]

VOCABULARY, WIDTH, HEADS, KV = 187, 24, 6, 3


class Model(nn.Module):
    """An embedding, one mixer under test, an MLP with biases and a padded vocabulary."""

    def __init__(self, mix: Callable[[Model, Tensor], Tensor]):
        super().__init__()
        self.mix = mix
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, WIDTH * KV // HEADS) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.memory = nn.Parameter(torch.randn(WIDTH, WIDTH // 2))
        self.prefix = nn.Parameter(torch.randn(1, 2, WIDTH))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """q [B, 6, S, 4], k and v [B, 3, S, 4]."""
        return tuple(
            w(x).view(*x.shape[:2], -1, WIDTH // HEADS).transpose(1, 2)
            for w in (self.q, self.k, self.v)
        )

    def merged(self, y: Tensor) -> Tensor:
        return self.o(y.transpose(1, 2).flatten(2))

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.mix(self, self.embedding(tokens))
        x = F.rms_norm(x + self.down(F.silu(self.up(x))), (WIDTH,))
        logits = self.head(x)
        if labels is None:
            return logits.logsumexp(-1).pow(2).sum()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


Mixer = Callable[[Model, Tensor], Tensor]


def nothing(m: Model, x: Tensor) -> Tensor:
    return x


def norm_without_eps(m: Model, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    q, k = (F.rms_norm(t, (t.shape[-1],), eps=0.0) for t in (q, k))
    return x + m.merged(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def spelled_norm_without_eps(m: Model, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    q, k = (t * t.pow(2).mean(-1, keepdim=True).rsqrt() for t in (q, k))
    return x + m.merged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def attention_without_heads(m: Model, x: Tensor) -> Tensor:
    k = m.k(x)
    return x * F.scaled_dot_product_attention(k, k, m.v(x), is_causal=True).mean(-1, keepdim=True)


def attention_with_wide_values(m: Model, x: Tensor) -> Tensor:
    """The values are wider than queries and keys."""
    _, k, v = m.heads(x)
    y = F.scaled_dot_product_attention(k[..., :2], k[..., 2:], v, is_causal=True)
    return x + m.merged(torch.cat([y, y], 1))


def attention_over_heads(m: Model, x: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in m.heads(x))
    y = F.scaled_dot_product_attention(q, k, v).flatten(2)
    q, k, v = m.heads(x + m.o(y))
    return x + m.merged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def eager(m: Model, x: Tensor, repeat: Callable[[Tensor], Tensor]) -> Tensor:
    q, k, v = m.heads(x)
    n = x.shape[1]
    mask = torch.full((n, n), float("-inf"), dtype=x.dtype).triu(1)
    scores = q @ repeat(k).transpose(2, 3) / 2 + mask
    return x + m.merged(scores.softmax(-1) @ repeat(v))


def eager_interleaved(m: Model, x: Tensor) -> Tensor:
    return eager(m, x, lambda t: t.repeat_interleave(HEADS // KV, 1))


def eager_expanded(m: Model, x: Tensor) -> Tensor:
    def repeat(t: Tensor) -> Tensor:
        b, h, n, d = t.shape
        return t[:, :, None].expand(b, h, HEADS // h, n, d).reshape(b, HEADS, n, d)

    return eager(m, x, repeat)


def eager_without_repeat(m: Model, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    q = q[:, :KV] + q[:, KV:]
    mask = q.new_full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
    y = (q @ k.transpose(2, 3) + mask).softmax(-1) @ v
    return x + m.merged(torch.cat([y, y], 1))


def linear_attention_einsum(m: Model, x: Tensor) -> Tensor:
    k, v = F.elu(m.k(x)) + 1, m.v(x)
    state = torch.einsum("bsd,bse->bde", k, v)
    return x + m.o(torch.einsum("bsd,bde->bse", k, state).repeat(1, 1, 2))


def linear_attention_matmul(m: Model, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (F.elu(k) + 1, v))
    return x + m.merged(q @ (k.transpose(2, 3) @ v))


def added_to_a_sum(m: Model, x: Tensor) -> Tensor:
    """The memory is added once, not by every rank."""
    memory = m.memory.expand(x.shape[0], -1, -1)
    return x + m.o(x * torch.baddbmm(memory, x.transpose(1, 2), m.k(x)).sum((1, 2))[:, None, None])


def row_added_to_a_sum(m: Model, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    return x @ torch.addmm(m.k.bias, flat.t(), m.k(x).flatten(0, 1)).repeat(1, 2)


def added_to_a_scaled_sum(m: Model, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    return x @ torch.addmm(m.memory, flat.t(), m.k(x).flatten(0, 1), beta=0.5, alpha=2.0).repeat(
        1, 2
    )


def scaled_row(m: Model, x: Tensor) -> Tensor:
    """The scales of a bias and of a product that a region sums."""
    y = torch.addmm(m.o.bias, m.q(x).flatten(0, 1), m.o.weight.t(), beta=0.5, alpha=2.0)
    return x + y.view(x.shape)


def over_tokens(fn: Callable[[Tensor], Tensor]) -> Mixer:
    return lambda m, x: x * fn(x)


def in_a_region(fn: Callable[[Tensor], Tensor]) -> Mixer:
    """The heads' values meet the sequence between q and o."""
    return lambda m, x: x + m.o(fn(m.q(x)))


def moved(fn: Callable[[Tensor], Tensor]) -> Mixer:
    return lambda m, x: x + fn(x)


def next_token(x: Tensor) -> Tensor:
    return F.pad(x[:, 1:], (0, 0, 0, 1))


def previous_token(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


# mixer, ops that run replicated
CASES: dict[str, tuple[Mixer, set[str]]] = {
    "nothing": (nothing, set()),
    "norm_without_eps": (norm_without_eps, set()),
    "spelled_norm_without_eps": (spelled_norm_without_eps, set()),
    "attention_without_heads": (attention_without_heads, set()),
    "attention_with_wide_values": (attention_with_wide_values, set()),
    "attention_over_heads": (attention_over_heads, set()),
    "eager_interleaved": (eager_interleaved, set()),
    "eager_expanded": (eager_expanded, set()),
    "eager_without_repeat": (eager_without_repeat, set()),
    "linear_attention_einsum": (linear_attention_einsum, set()),
    "linear_attention_matmul": (linear_attention_matmul, set()),
    "added_to_a_sum": (added_to_a_sum, set()),
    "row_added_to_a_sum": (row_added_to_a_sum, set()),
    "added_to_a_scaled_sum": (added_to_a_scaled_sum, set()),
    "scaled_row": (scaled_row, set()),
    "sum": (over_tokens(lambda x: x.sum(1)[:, None]), set()),
    "sum_keepdim": (over_tokens(lambda x: x.sum(1, keepdim=True)), set()),
    "mean": (over_tokens(lambda x: x.mean(1, keepdim=True)), set()),
    "mean_of_all": (over_tokens(lambda x: x.mean()), set()),
    "amax": (over_tokens(lambda x: x.amax(1, keepdim=True)), {"amax.default"}),
    "max": (over_tokens(lambda x: x.max(1, keepdim=True).values), {"max.dim"}),
    "var": (over_tokens(lambda x: x.var(1, keepdim=True, unbiased=False)), {"var.dim"}),
    "std": (over_tokens(lambda x: x.std(1, keepdim=True)), {"std.dim"}),
    "softmax": (over_tokens(lambda x: x.softmax(1)), {"softmax.int"}),
    "logsumexp": (over_tokens(lambda x: x.logsumexp(1, keepdim=True)), {"logsumexp.default"}),
    "cumsum": (over_tokens(lambda x: x.cumsum(1)), set()),
    "next_token": (moved(next_token), set()),
    "previous_token": (moved(previous_token), set()),
    "negative_pad": (moved(lambda x: F.pad(x, (0, 0, 1, -1))), set()),
    "roll": (moved(lambda x: x.roll(1, 1)), set()),
    "flip": (moved(lambda x: x.flip(1)), set()),
    "filled_like": (moved(lambda x: torch.full_like(x, 0.5) + torch.ones_like(x)), set()),
    "filled_new": (moved(lambda x: x.new_ones(x.shape[0], x.shape[1], WIDTH)), set()),
    "cumsum_in_a_region": (in_a_region(lambda h: h.cumsum(1)), set()),
    "amax_in_a_region": (in_a_region(lambda h: h * h.amax(1, keepdim=True)), {"amax.default"}),
    "mean_in_a_region": (in_a_region(lambda h: h * h.mean(1, keepdim=True)), set()),
    "roll_in_a_region": (in_a_region(lambda h: h + h.roll(1, 1)), set()),
    "shift_in_a_region": (in_a_region(next_token), set()),
}


def run(
    mix: Mixer,
    ranks: int,
    length: int,
    layout: str = "zigzag",
    schedule: str = "auto",
    labels: bool = False,
) -> Unit:
    """Verified against one device; a NaN on either side is an error."""
    torch.manual_seed(0)
    model = Model(mix).double()
    tokens = torch.randint(0, VOCABULARY, (2, length))
    args = (tokens, tokens) if labels else (tokens,)
    options = {"layout": layout, "schedule": schedule}
    found = tspc.verify(model, args, {}, ranks, options, 1e-9)
    assert found.errors["gradient of"]
    (graph,) = found.graphs
    return graph.rewritten


def replicated(r: Unit) -> set[str]:
    return {f.op.removeprefix("aten.") for f in r.typed.fallbacks}


SIZES = [
    (3, 13, "zigzag"),
    (4, 3, "contiguous"),
    (2, 13, "contiguous"),
    (4, 3, "zigzag"),
    (4, 16, "zigzag"),
]
DRAWN = [  # every case at two of the sizes, in turn; the others are wide
    pytest.param(name, *size, marks=() if k in (i % 5, (i + 2) % 5) else pytest.mark.wide)
    for i, name in enumerate(CASES)
    for k, size in enumerate(SIZES)
]


@pytest.mark.parametrize("name,ranks,length,layout", DRAWN)
def test_equals_one_device(name: str, ranks: int, length: int, layout: str) -> None:
    mix, expected = CASES[name]
    assert replicated(run(mix, ranks, length, layout)) == expected


@pytest.mark.parametrize(
    "schedule,name",
    each_once(
        ["ring", "broadcast", "gather", "stationary"],
        ["nothing", "norm_without_eps", "spelled_norm_without_eps"],
    ),
)
def test_padded_units(name: str, schedule: str) -> None:
    """187 words, 10 columns and 3 K/V heads on 4 ranks; biases inside and outside of the sum."""
    rewritten = run(CASES[name][0], 4, 13, schedule=schedule)
    folds = [n.kwargs["fold"] for n in rewritten.folds]
    assert {f.size for f in folds} == {10, VOCABULARY} | ({KV} if name != "nothing" else set())
    assert all(f.units * 4 > f.size for f in folds)


@pytest.mark.parametrize("ranks,length", [(2, 7), (3, 13), (4, 3)])
def test_labels_shifted_on_logits(ranks: int, length: int) -> None:
    rewritten = run(norm_without_eps, ranks, length, labels=True)
    assert not replicated(rewritten)


def whole_sequences(fn: Callable[[Model, Tensor], Tensor]) -> set[str]:
    rewritten = run(fn, 3, 13)
    assert not rewritten.folds
    return {f.why for f in rewritten.typed.fallbacks}


def test_a_sequence_that_is_part_of_a_dim() -> None:
    """Prompts before the tokens, pads at both ends, a first token of its own."""

    def prompts(m: Model, x: Tensor) -> Tensor:
        return torch.cat([m.prefix.expand(x.shape[0], -1, -1), x], 1)

    def pads(m: Model, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 2, 1))

    def first(m: Model, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x[:, 1:] * 2], 1)

    for fn in (prompts, pads, first):
        assert whole_sequences(fn) == {"the sequence is part of a dim"}
