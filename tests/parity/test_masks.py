"""Masks: what is recognised, what is kept, and that attention under every kind of mask equals one
device's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import tspc
from tests.support.models import VOCABULARY, make
from tests.support.wide import each_once
from tests.support.widen import Widen
from tspc.backend.simulated import Simulated
from tspc.ops.attention import ATTENTION, bound

pytestmark = [pytest.mark.slow, pytest.mark.sampled(2)]

Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def causal_tril(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    n = q.shape[2]
    return torch.ones(n, n, dtype=torch.bool).tril()


def causal_compare(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    at = torch.arange(q.shape[2])
    return (at[None, :] <= at[:, None])[None, None]


def causal_infinite(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    n = q.shape[2]
    return torch.full((n, n), float("-inf"), dtype=q.dtype).triu(1)


def causal_finite(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    n = q.shape[2]
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    zero = torch.zeros(n, n, dtype=q.dtype)
    return zero.masked_fill(~keep, torch.finfo(torch.float32).min)


def causal_of_numbers(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    """Numbers, taken as a bool."""
    return ~torch.where(causal_tril(q, pad), 0.0, torch.finfo(torch.float32).min).bool()


def padding(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    return pad.bool()[:, None, None, :]


def causal_and_padding(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    return causal_compare(q, pad) & padding(q, pad)


def window(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    at = torch.arange(q.shape[2])
    near = at[:, None] - at[None, :] < 4
    return (causal_tril(q, pad) & near)[None, None]


def nearest(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    at = torch.arange(q.shape[2])
    return causal_compare(q, pad) & (at[:, None] - at[None, :] < 4)


def packed(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    document = (pad == 0).cumsum(-1)
    return causal_compare(q, pad) & (document[:, None, :, None] == document[:, None, None, :])


def strictly_before(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    at = torch.arange(q.shape[2])
    return (at[None, :] < at[:, None])[None, None]


def scalar_and_causal(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    return torch.ones((), dtype=torch.bool) & causal_compare(q, pad)


def data_and_causal(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    """One number, of no dim."""
    return (pad.sum() > 0) & causal_compare(q, pad)


class Attention(nn.Module):
    """Two layers of attention under one mask."""

    def __init__(self, mask: Mask):
        super().__init__()
        self.mask, self.heads = mask, 4
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, tokens: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for qkv, out in zip(self.qkv, self.out):
            q, k, v = (
                t.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2) for t in qkv(x).chunk(3, -1)
            )
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(q, pad))
            x = x + out(y.transpose(1, 2).flatten(2))
        return x


def inputs(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    pad = torch.ones(3, length, dtype=torch.long)
    pad[0, length - 3 :] = 0
    pad[1, 5] = 0
    return torch.randint(0, VOCABULARY, (3, length)), pad


def decision(graph: Simulated) -> set[tuple[bool, bool]]:
    """(causal, has a mask operand) of every attention in the folds."""
    bodies = list(graph.rewritten.bodies.values())
    return {(a.spec.causal, a.operands.mask is not None) for b in bodies for a in b.attentions}


MASKS = [
    (causal_tril, True, False),
    (causal_compare, True, False),
    (causal_infinite, True, False),
    (causal_finite, True, False),
    (causal_of_numbers, True, False),
    (padding, False, True),
    (causal_and_padding, True, True),
    (window, True, False),
    (nearest, True, False),
    (packed, True, False),
    (scalar_and_causal, True, False),
    (data_and_causal, True, False),
]
CASES = [(3, "broadcast"), (2, "stationary"), (4, "gather")]


@pytest.mark.parametrize("mask,causal,kept,ranks,schedule", each_once(MASKS, CASES))
def test_masks(mask: Mask, causal: bool, kept: bool, ranks: int, schedule: str) -> None:
    torch.manual_seed(0)
    model = Attention(mask).double()
    with Widen():
        found = tspc.verify(model, inputs(13), {}, ranks, {"schedule": schedule}, 1e-9)
    (graph,) = found.graphs
    assert decision(graph) == {(causal, kept)}
    if mask in (causal_and_padding, padding):
        shapes = {
            str(graph.rewritten.typed.program.type_of(r).shape)
            for n in graph.rewritten.folds
            for group in n.args[:2]
            for r in group
            if graph.rewritten.typed.program.type_of(r).dtype == torch.bool
        }
        assert shapes == {"(3, 1, 1, 13)"}  # one row, never [S, S]


def scattered(q: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    at = torch.arange(q.shape[2])
    return torch.cdist(at[:, None].double(), at[None, :].double().T).sin() < 0.5


def test_a_kept_mask_is_made_on_the_rows_of_its_rank() -> None:
    torch.manual_seed(0)
    typed = tspc.plan(Attention(scattered), inputs(13), ranks=3).rewritten.typed
    assert typed.leaf is not None
    length = typed.leaf.size
    squares = [
        typed.places[n.name, 0]
        for n in typed.program.nodes
        if n.is_call and n.type.dtype == torch.bool and n.type.shape[-2:] == (length, length)
    ]
    assert squares and set(squares) == {"S"}  # nobody makes [S, S]


@pytest.mark.parametrize("name", ["hf_llama", "hf_qwen3"])
@pytest.mark.parametrize("padded", [False, True])
def test_library_masks(name: str, padded: bool) -> None:
    tokens, pad = inputs(13)
    kwargs: dict[str, Any] = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    if padded:
        kwargs["attention_mask"] = pad
    with Widen():
        found = tspc.verify(make(name), (), kwargs, 3, {}, 1e-9)
    assert decision(found.graphs[0]) == {(True, padded)}
    assert not found.graphs[0].rewritten.typed.fallbacks


def test_an_unknown_mask_is_left_alone() -> None:
    model = Attention(scattered).double()
    plan = tspc.plan(model, inputs(13), ranks=2)
    program = plan.rewritten.analysis.program
    assert all(bound(n)[0].mask is not None for n in program.nodes if n.op == ATTENTION)
    with Widen():
        tspc.verify(model, inputs(13), {}, 2, {}, 1e-9)
