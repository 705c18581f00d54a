"""Attention written out as products and a softmax becomes one op, cut along the sequence, equal to
one device's; what only looks like it stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import tspc
from tests.parity.test_masks import decision, inputs
from tests.support.models import VOCABULARY, make, tokens_of
from tests.support.wide import each_once
from tests.support.widen import Widen
from tspc.backend.simulated import Simulated, simulated_backend

pytestmark = pytest.mark.sampled(2)

Tensor = torch.Tensor
# (model, q, k, v [b, h, s, d], key padding [b, s]) -> [b, h, s, d]
Attend = Callable[["Eager", Tensor, Tensor, Tensor, Tensor], Tensor]
LOWEST = torch.finfo(torch.float32).min


class Eager(nn.Module):
    """Two layers of attention, then an MLP."""

    def __init__(self, attend: Attend):
        super().__init__()
        self.attend, self.heads, self.dropout = attend, 4, nn.Dropout(0.0)
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("tril", torch.ones(64, 64).tril()[None, None])

    def forward(self, tokens: Tensor, pad: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for qkv, out in zip(self.qkv, self.out):
            q, k, v = (
                t.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2) for t in qkv(x).chunk(3, -1)
            )
            x = x + out(self.attend(self, q, k, v, pad).transpose(1, 2).flatten(2))
        return x


def plain(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return F.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1) @ v


def nano_gpt(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    n = q.shape[2]
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    scores = scores.masked_fill(m.tril[:, :, :n, :n] == 0, float("-inf"))
    return m.dropout(F.softmax(scores, dim=-1)) @ v


def triangle(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    n = q.shape[2]
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    scores = torch.matmul(q / 3, k.mT).masked_fill(~keep, -torch.inf)
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float64).to(q.dtype), v)


def batched(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    b, h, n, d = q.shape
    q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) * 0.25
    weights = torch.softmax(scores + torch.full((n, n), -torch.inf).triu(1), -1)
    return torch.bmm(weights, v).view(b, h, n, d)


def by_letters(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    n = scores.shape[-1]
    scores = torch.where(torch.ones(n, n, dtype=torch.bool).tril(), scores, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def padded(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    n = q.shape[2]
    scores = q @ k.mT * 0.3 + torch.full((n, n), LOWEST).triu(1)
    scores = scores + (1.0 - pad[:, None, None, :].to(q.dtype)) * LOWEST
    return F.softmax(scores, -1) @ v


def distances(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """A bias that is added before the scale."""
    at = torch.arange(q.shape[2])
    bias = -(at[:, None] - at[None, :]).abs().to(q.dtype)
    return F.softmax((q @ k.mT + bias) * 0.25, -1) @ v


def capped(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return F.softmax(torch.tanh(q @ k.mT / 5) * 5, -1) @ v


def capped_and_masked(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    n = q.shape[2]
    scores = 3.0 * torch.tanh(q @ k.mT * 0.3 / 3.0)
    scores = scores + torch.full((n, n), LOWEST).triu(1)
    scores = scores + (1.0 - pad[:, None, None, :].to(q.dtype)) * LOWEST
    return m.dropout(F.softmax(scores, -1)) @ v


def squashed(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """More than a cap; scaled and masked after it."""
    n = q.shape[2]
    scores = 1.0 - torch.sigmoid(q @ k.mT - 0.1).clamp(min=0.2) ** 2
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    return F.softmax((scores * 3).masked_fill(~keep, -torch.inf), -1) @ v


def learned_bias(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return F.softmax(m.bias + q @ k.mT * 0.3, -1) @ v


def relative(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """A learned number for each head and distance, and a mask."""
    n = q.shape[2]
    at = torch.arange(n)
    table = torch.cat([m.bias[:, :, 0], m.bias[:, :, 0] ** 2], 1)
    bias = table[:, ((at[:, None] - at) > 2).long()]
    scores = (q @ k.mT * 0.3 + bias).masked_fill(torch.ones(n, n).triu(1) > 0, LOWEST)
    return F.softmax(scores, -1) @ v


CASES: dict[Attend, tuple[bool, bool]] = {
    plain: (False, False),
    nano_gpt: (False, True),
    triangle: (True, False),
    batched: (True, False),
    by_letters: (True, False),
    padded: (True, True),
    distances: (False, True),
    capped: (False, False),
    capped_and_masked: (True, True),
    squashed: (True, False),
    learned_bias: (False, True),
    relative: (True, True),
}


@pytest.mark.parametrize(
    "attend,ranks,schedule,length",
    each_once(list(CASES), [(3, "auto", 13), (2, "stationary", 12)]),
)
def test_becomes_one_op(attend: Attend, ranks: int, schedule: str, length: int) -> None:
    torch.manual_seed(0)
    model = Eager(attend).double()
    tokens, pad = inputs(length)
    pad[2, :2] = 0  # rows without a key where the mask is causal
    with Widen():
        found = tspc.verify(model, (tokens, pad), {}, ranks, {"schedule": schedule}, 1e-9)
    (graph,) = found.graphs
    assert decision(graph) == {CASES[attend]}
    assert len(graph.rewritten.choice.regions) == 2 and not graph.rewritten.typed.fallbacks


def weights_too(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    weights = F.softmax(q @ k.mT, -1)
    return weights @ v + weights.mean()


def shallow_fill(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Scores that are replaced by -5 still count."""
    n = q.shape[2]
    scores = (q @ k.mT).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -5.0)
    return F.softmax(scores, -1) @ v


def filled_then_capped(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """The mask is not what is added last."""
    n = q.shape[2]
    scores = (q @ k.mT).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    return F.softmax(torch.tanh(scores / 5) * 5, -1) @ v


def over_queries(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return F.softmax(q @ k.mT * 0.3, -2) @ v


@pytest.mark.parametrize(
    "attend",
    [weights_too, shallow_fill, filled_then_capped, over_queries],
    ids=lambda f: f.__name__,
)
def test_what_only_looks_like_it_is_right(attend: Attend) -> None:
    torch.manual_seed(0)
    model = Eager(attend).double()
    with Widen():
        found = tspc.verify(model, inputs(13), {}, 3, {}, 1e-9)
    assert decision(found.graphs[0]) == set()


def test_rows_without_a_key_are_undefined_as_in_the_model() -> None:
    """Left padding filled with -inf under a causal mask: NaN there and nowhere else."""

    def attend(m: Eager, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        n = q.shape[2]
        keep = torch.ones(n, n, dtype=torch.bool).tril() & pad.bool()[:, None, None, :]
        y = F.softmax((q @ k.mT).masked_fill(~keep, -torch.inf), -1) @ v
        return y if n < 64 else torch.nan_to_num(y)

    torch.manual_seed(0)
    model = Eager(attend).double()
    model.qkv, model.out = model.qkv[:1], model.out[:1]
    tokens, pad = inputs(13)
    pad[2, :4] = 0
    made: list[Simulated] = []
    torch._dynamo.reset()
    with Widen(), torch.no_grad():
        expected = model(tokens, pad)
        got = torch.compile(model, backend=simulated_backend(3, graphs=made))(tokens, pad)
    assert len(decision(made[0])) == 1
    assert torch.equal(expected.isnan(), got.isnan()) and int(got.isnan().any(-1).sum()) == 4
    assert torch.allclose(expected.nan_to_num(), got.nan_to_num(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["hf_llama", pytest.param("hf_qwen3", marks=pytest.mark.wide)])
def test_a_library_model(name: str) -> None:
    model: Any = make(name)
    model.set_attn_implementation("eager")
    tokens = tokens_of(11)
    with Widen():
        found = tspc.verify(model, (), {"input_ids": tokens, "labels": tokens}, 3, {}, 1e-9)
    (graph,) = found.graphs
    assert decision(graph) == {(True, False)}
    assert len(graph.rewritten.choice.regions) == 5 and not graph.rewritten.typed.fallbacks
