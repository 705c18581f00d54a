"""Attention with a learned logit per head beside the scores is one attention with sinks: equal to
one device, also where a query sees no key; what only looks like it stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import tspc
from tests.parity.test_masks import inputs
from tests.support.models import VOCABULARY
from tspc.backend.simulated import Simulated
from tspc.ops.attention import ATTENTION, sinks_gradient, sunk
from tspc.runtime.fold.pieces import cotangent_names

HEADS, DIM = 3, 4
# (scores [b, h, q, k], the sinks as a parameter, values) -> out
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    def __init__(self, attend: Attend, sinks: tuple[int, ...] = (HEADS,)) -> None:
        super().__init__()
        width = HEADS * DIM
        self.attend = attend
        self.words = nn.Embedding(VOCABULARY, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.sinks = nn.Parameter(torch.randn(sinks))

    def forward(self, tokens: Tensor, pad: Tensor) -> Tensor:
        x, n = self.words(tokens), tokens.shape[1]
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        keep = torch.ones(n, n, dtype=torch.bool).tril() & pad.bool()[:, None, None, :]
        scores = (q @ k.mT * 0.4).masked_fill(~keep, -torch.inf)
        y = self.attend(scores, self.sinks, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


def less_the_greatest(scores: Tensor, sinks: Tensor, v: Tensor) -> Tensor:
    column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
    both = torch.cat([scores, column], -1)
    both = both - both.max(-1, keepdim=True).values
    weights = F.softmax(both, -1, dtype=torch.float64)[..., :-1]
    return F.dropout(weights, 0.0) @ v


def plain(scores: Tensor, sinks: Tensor, v: Tensor) -> Tensor:
    column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], 3).softmax(-1)[..., : scores.shape[-1]] @ v


def shaped(scores: Tensor, sinks: Tensor, v: Tensor) -> Tensor:
    column = sinks.view(1, HEADS, 1, 1).expand(scores.shape[0], HEADS, scores.shape[2], 1)
    return F.softmax(torch.cat([scores, column], -1), -1)[:, :, :, :-1] @ v


def run(model: nn.Module, ranks: int, schedule: str = "auto") -> Simulated:
    tokens, pad = inputs(13)
    pad[2, :4] = 0  # the first queries see nothing but the sink
    found = tspc.verify(model.double(), (tokens, pad), {}, ranks, {"schedule": schedule}, 1e-9)
    assert "sinks" in found.errors["gradient of"]
    (graph,) = found.graphs
    return graph


@pytest.mark.parametrize(
    "attend,ranks,schedule",
    [(less_the_greatest, 2, "auto"), (plain, 3, "stationary"), (shaped, 4, "gather")],
)
def test_equals_one_device(attend: Attend, ranks: int, schedule: str) -> None:
    torch.manual_seed(0)
    graph = run(
        Model(attend, (HEADS,) if attend is not shaped else (1, HEADS, 1, 1)), ranks, schedule
    )
    (body,) = graph.rewritten.bodies.values()
    (attention,) = body.attentions
    assert attention.operands.sinks and not graph.rewritten.typed.fallbacks
    made = [
        i for i, s in enumerate(body.steps) if attention.operands.sinks in getattr(s, "writes", ())
    ]
    assert all(attention.operands.sinks in cotangent_names(body, i) for i in made) and made


def first_column(scores: Tensor, sinks: Tensor, v: Tensor) -> Tensor:
    column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([column, scores], 3).softmax(-1)[..., :-1] @ v


def of_queries(scores: Tensor, sinks: Tensor, v: Tensor) -> Tensor:
    column = v.sum(-1, keepdim=True) + sinks[:, None, None]
    return torch.cat([scores, column], 3).softmax(-1)[..., :-1] @ v


def less_something(scores: Tensor, sinks: Tensor, v: Tensor) -> Tensor:
    column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    both = torch.cat([scores, column], 3)
    return (both - 2 * both.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("attend", [first_column, of_queries, less_something])
def test_what_only_looks_like_it_is_right(attend: Attend) -> None:
    torch.manual_seed(0)
    graph = run(Model(attend), 3)
    attentions = [a for b in graph.rewritten.bodies.values() for a in b.attentions]
    assert not any(a.operands.sinks for a in attentions)


def test_the_gradient_of_a_sink() -> None:
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, HEADS, 5, DIM).double() for _ in range(4))
    sinks = torch.randn(HEADS).double().requires_grad_()
    expected = ATTENTION(q, k, v, sinks=sinks, causal=True)
    (gradient,) = torch.autograd.grad(expected, sinks, g)
    scores = (q @ k.mT * DIM**-0.5).masked_fill(~torch.ones(5, 5).bool().tril(), -torch.inf)
    out, lse = sunk(scores.softmax(-1) @ v, scores.logsumexp(-1), sinks.detach())
    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-12)
    made = sinks_gradient(g, out, lse, sinks.detach())
    torch.testing.assert_close(made, gradient, rtol=1e-12, atol=1e-12)
