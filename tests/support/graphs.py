"""Small random graphs over the rule table: steps that make a value of tokens [B, S, h] of two
others, drawn by hypothesis with sizes, ranks, layout, schedule and mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

MASKS = ("none", "causal", "window", "padding", "bias")
WORDS = 17


@dataclass(frozen=True)
class Graph:
    """Steps are applied in order, each to the last value and to one of those before it."""

    steps: tuple[tuple[str, int], ...]
    end: str
    ranks: int
    layout: str
    schedule: str
    batch: int
    length: int
    heads: int
    width: int
    mask: str
    embedded: bool

    @property
    def hidden(self) -> int:
        return self.heads * self.width


Step = Callable[["Model", nn.ParameterList, Tensor, Tensor], Tensor]
STEPS: dict[str, tuple[tuple[str, ...], Step]] = {}


def step(*weights: str) -> Callable[[Step], Step]:
    """Weights: their shapes by letters, h: hidden, f: another width, v: words."""

    def register(fn: Step) -> Step:
        STEPS[fn.__name__] = (weights, fn)
        return fn

    return register


@step("fh", "f", "hf")
def mlp(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w[0], w[1])), w[2]) + y


@step("fh", "fh", "hf", "h")
def gated(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(y, w[0])) * F.linear(x, w[1]), w[2], w[3])


@step("hf", "fh")
def flattened(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    return ((x.flatten(0, 1) @ w[0]).tanh() @ w[1]).view(x.shape) + y


@step("hh", "hh", "hh", "hh")
def attention(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    q, k, v = (
        F.linear(t, p).unflatten(-1, (m.g.heads, -1)).transpose(1, 2) for t, p in zip((x, y, y), w)
    )
    a = F.scaled_dot_product_attention(q, k, v, m.mask(x), is_causal=m.g.mask == "causal")
    return F.linear(a.transpose(1, 2).flatten(2), w[3])


@step("hh", "hh", "hh")
def written_out(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    q, k = F.linear(x, w[0]), F.linear(x, w[1])
    scores = torch.einsum("bqd,bkd->bqk", q, k) / m.g.hidden**0.5
    at = torch.arange(x.shape[1])
    if m.g.mask != "none":
        scores = scores.masked_fill(at[:, None] < at[None, :], -torch.inf)
    return torch.bmm(scores.softmax(-1), F.linear(x, w[2])) + y


@step("h")
def rms(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.rms_norm(x, (m.g.hidden,), w[0]) * y.sigmoid()


@step("h", "h")
def layer_norm(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.layer_norm(x + y, (m.g.hidden,), w[0], w[1])


@step("hf", "fh")
def soft_choice(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    return (x @ w[0]).softmax(-1) @ w[1] - 0.5 * y


@step("hf", "fh")
def log_chances(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    z = x @ w[0]
    return (z - z.logsumexp(-1, keepdim=True)) @ w[1] * 0.1 + y


@step()
def means(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    return x - y.mean(1, keepdim=True) + y.mean((0, 2), keepdim=True)


@step()
def spread(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    return x / (1 + y.var(-1, keepdim=True)) + y.square().sum(1, keepdim=True).tanh()


@step()
def greatest(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    return x - x.amax(1, keepdim=True).sigmoid() + y.max(-1, keepdim=True).values


@step()
def running(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    return x.cumsum(1) / 4 + y.flip(2)


@step()
def turned(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.roll(x, 1, 1) * y.tanh() + x.flip(1)


@step("h")
def earlier(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.pad(x[:, :-1], (0, 0, 1, 0)) * w[0] + y


@step()
def halves(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    k = m.g.hidden // 2
    return torch.cat([-y[..., k:], x[..., :k]], -1)


@step()
def joined(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    k = x.shape[1] // 2
    return torch.cat([x[:, :k], y[:, k:]], 1)


@step()
def stacked(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    a, b = torch.stack([x, y], 2).unbind(2)
    return torch.stack([a.sin(), b], -1).mean(-1)


@step("hh")
def by_head(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    """A norm of each head, between two views."""
    z = F.linear(x, w[0]).unflatten(-1, (m.g.heads, m.g.width)).permute(0, 2, 1, 3)
    return (z / (1 + z.square().sum(-1, keepdim=True))).permute(0, 2, 1, 3).flatten(2) + y


@step("hh")
def between(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    """A product over the sequence."""
    return torch.einsum("bsd,bse,df->bef", x, y, w[0]).mean(1, keepdim=True).tanh() + x


@step()
def chosen(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    at = torch.arange(x.shape[1])
    return torch.where((at % 3 == 0)[:, None], x, y.clamp(-1, 1)) + y[:, -1:]


@step("hf", "fh")
def repeated(m: Model, w: Any, x: Tensor, y: Tensor) -> Tensor:
    z = (x @ w[0]).repeat_interleave(2, -1).unflatten(-1, (-1, 2)).sum(-1)
    return z.pow(2) @ w[1] * 0.1 + y


def cross_entropy(m: Model, x: Tensor, tokens: Tensor) -> Tensor:
    logits = F.linear(x, m.table)
    return F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten(), ignore_index=3)


ENDS: dict[str, Callable[[Model, Tensor, Tensor], Any]] = {
    "cross entropy": cross_entropy,
    "square": lambda m, x, tokens: x.square().mean(),
    "last": lambda m, x, tokens: F.linear(x[:, -1], m.table).logsumexp(-1).sum(),
    "value": lambda m, x, tokens: x,
}


class Model(nn.Module):
    def __init__(self, g: Graph) -> None:
        super().__init__()
        self.g, sizes = g, {"h": g.hidden, "f": 10, "v": WORDS}
        self.table = nn.Parameter(torch.randn(WORDS, g.hidden) * 0.5)
        self.weights = nn.ModuleList()
        for name, _ in g.steps:
            shapes = [[sizes[l] for l in letters] for letters in STEPS[name][0]]
            self.weights.append(nn.ParameterList(torch.randn(s) / s[-1] ** 0.5 for s in shapes))

    def mask(self, x: Tensor) -> Tensor | None:
        at = torch.arange(x.shape[1])
        distance = at[:, None] - at[None, :]
        if self.g.mask == "window":
            return (distance >= 0) & (distance < 3)
        if self.g.mask == "padding":
            lengths = torch.arange(x.shape[0])[:, None] + x.shape[1] - x.shape[0]
            return (at[None] < lengths.clamp(min=1))[:, None, None]
        return -0.3 * distance.abs().to(x.dtype) if self.g.mask == "bias" else None

    def forward(self, tokens: Tensor, given: Tensor) -> Any:
        values = [F.embedding(tokens, self.table) if self.g.embedded else given]
        for (name, other), weights in zip(self.g.steps, self.weights):
            y = values[other % len(values)]
            values.append(STEPS[name][1](self, weights, values[-1], y))
        return ENDS[self.g.end](self, values[-1], tokens)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    ranks = draw(st.integers(2, 4))
    one = st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5))
    return Graph(
        tuple(draw(st.lists(one, min_size=2, max_size=6))),
        draw(st.sampled_from(sorted(ENDS))),
        ranks,
        draw(st.sampled_from(["auto", "contiguous", "zigzag"])),
        draw(st.sampled_from(["auto", "ring", "broadcast", "gather", "stationary"])),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([2, 3, 5, 7, 8, 11, 12])),
        draw(st.integers(1, 3)),
        2 * draw(st.integers(1, 3)),
        draw(st.sampled_from(MASKS)),
        draw(st.booleans()),
    )
