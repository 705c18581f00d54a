"""Masks that are carried as predicates: each kind equals one device's, is no mask tensor, and
matters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

import tspc
from tests.support.models import VOCABULARY
from tests.support.wide import each_once
from tests.support.widen import Widen
from tspc.backend.simulated import Simulated, simulated_backend
from tspc.ir.layout import Layout, Span
from tspc.ir.spec import AttentionSpec, Operands
from tspc.masks.index import held
from tspc.runtime.attention import blocks, keys

pytestmark = [pytest.mark.slow, pytest.mark.sampled(3)]

Tensor = torch.Tensor
LENGTH = 13


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(x.shape[2])
    return at[:, None], at[None, :]


def window(x: Tensor, pad: Tensor) -> Tensor:
    q, k = positions(x)
    return (k <= q) & (q - k < 4)


def band(x: Tensor, pad: Tensor) -> Tensor:
    q, k = positions(x)
    return (q - k).abs() <= 2


def chunked(x: Tensor, pad: Tensor) -> Tensor:
    q, k = positions(x)
    return (q // 5 == k // 5) & (k <= q)


def prefix(x: Tensor, pad: Tensor) -> Tensor:
    q, k = positions(x)
    return (k < 5) | (k <= q)


def prefixes(x: Tensor, pad: Tensor) -> Tensor:
    q, k = positions(x)
    return (k < pad.sum(-1)[:, None, None, None] // 2) | (k <= q)


def half(x: Tensor, pad: Tensor) -> Tensor:
    """Sizes of the program in the predicate."""
    q, k = positions(x)
    return (k <= q) | (k < x.shape[2] // 2)


def packed(x: Tensor, pad: Tensor) -> Tensor:
    q, k = positions(x)
    document = (pad == 0).cumsum(-1)
    return (k <= q) & (document[:, None, :, None] == document[:, None, None, :])


def documents(x: Tensor, pad: Tensor) -> Tensor:
    """Of bounds, as `cu_seqlens`."""
    q, k = positions(x)
    bounds = torch.tensor([4, 9, 13])
    document = torch.searchsorted(bounds, torch.arange(x.shape[2]), right=True)
    return ((k <= q) & (document[:, None] == document[None, :]))[None, None]


def following(x: Tensor, pad: Tensor) -> Tensor:
    """A key that is no pad, for a query that is none."""
    q, k = positions(x)
    valid = pad.bool()
    return (k <= q) & valid[:, None, :, None] & valid[:, None, None, :]


def padded_window(x: Tensor, pad: Tensor) -> Tensor:
    return window(x, pad) & pad.bool()[:, None, None, :]


def strictly_before(x: Tensor, pad: Tensor) -> Tensor:
    q, k = positions(x)
    return (k < q)[None, None]


def mapped(x: Tensor, pad: Tensor) -> Tensor:
    """Of one batch entry, query and key, under vmap; ended by its first pad."""
    ends = (pad == 0).cumsum(-1)

    def one(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (ends[b, q] == ends[b, k])

    for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
        one = torch.vmap(one, in_dims=dims)
    at = torch.arange(x.shape[2])
    return one(torch.arange(len(pad)), at, at)[:, None]


KINDS: dict[Callable[..., Tensor], str] = {
    window: "(k + 3 >= q)",
    band: "((k + 2 >= q) & (q + 2 >= k))",
    chunked: "((k // 5) == (q // 5))",
    prefix: "((k <= 4) | (q >= k))",
    prefixes: "(((d0[0] // 2) >= k + 1) | (q >= k))",
    packed: "(d0[k] == d0[q])",
    documents: "(d0[k] == d0[q])",
    following: "((d0[k] != 0) & (d0[q] != 0))",
    padded_window: "((d0[k] != 0) & (k + 3 >= q))",
    strictly_before: "(q >= k + 1)",
    mapped: "(d0[k] == d0[q])",
}


class Model(nn.Module):
    """Layers of attention under one mask: of torch's op, or written out with a fill."""

    def __init__(self, mask: Callable[..., Tensor], fill: float | None = None, layers: int = 2):
        super().__init__()
        self.mask, self.heads, self.fill = mask, 4, fill
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if self.fill is None:
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        added = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, self.fill)
        return torch.softmax(scores + added, -1) @ v

    def forward(self, tokens: Tensor, pad: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for qkv, out in zip(self.qkv, self.out):
            q, k, v = (
                t.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2) for t in qkv(x).chunk(3, -1)
            )
            y = self.attend(q, k, v, self.mask(q, pad))
            x = x + out(y.transpose(1, 2).flatten(2))
        return x


def inputs(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    pad = torch.ones(3, length, dtype=torch.long)
    pad[0, length - 3 :] = 0
    pad[1, 5] = 0
    pad[2, :2] = 0
    return torch.randint(0, VOCABULARY, (3, length)), pad


def attentions(graph: Simulated) -> list[Any]:
    return [a for b in graph.rewritten.bodies.values() for a in b.attentions]


def squares(graph: Simulated) -> list[str]:
    """The values of the program over queries and keys."""
    typed = graph.rewritten.typed
    assert typed.leaf is not None
    n = typed.leaf.size
    return [
        x.name
        for x in typed.program.nodes
        for t in x.types
        if t is not None and list(t.shape).count(n) > 1
    ]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "EDGE", 3)


CASES = [(2, {"schedule": "broadcast"}), (3, {"schedule": "stationary", "layout": "zigzag"})]


@pytest.mark.parametrize("mask,ranks,options", each_once(list(KINDS), CASES))
def test_kinds(
    mask: Callable[..., Tensor], ranks: int, options: dict[str, str], small_blocks: None
) -> None:
    torch.manual_seed(0)
    model = Model(mask).double()
    with Widen():
        found = tspc.verify(model, inputs(), {}, ranks, options, 1e-9)
    (graph,) = found.graphs
    assert {a.spec.predicate for a in attentions(graph)} == {KINDS[mask]}
    assert all(a.operands.mask is None for a in attentions(graph))
    assert not squares(graph)
    with torch.no_grad():  # and it matters
        masked = model(*inputs())
        model.mask = lambda x, pad: torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
        assert not torch.allclose(masked, model(*inputs()), atol=1e-3)


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("mask", [padded_window, window, following])
def test_rows_without_a_key_are_the_models(
    mask: Callable[..., Tensor], fill: float, small_blocks: None
) -> None:
    """NaN where nothing but -inf is left, the mean over all keys where a fill is finite."""
    torch.manual_seed(0)
    model = Model(mask, fill, 1 if fill == -math.inf else 2).double()
    if fill == -math.inf and mask is not window:
        given = inputs()
        torch._dynamo.reset()
        with torch.no_grad(), Widen():
            made: list[Simulated] = []
            compiled = torch.compile(model, backend=simulated_backend(3, graphs=made))
            mine, one = compiled(*given), model(*given)
        assert torch.isnan(one).any()
        assert torch.allclose(mine, one, rtol=1e-9, atol=1e-9, equal_nan=True)
        assert {a.spec.fill for a in attentions(made[0])} == {fill}
        return
    with Widen():
        found = tspc.verify(model, inputs(), {}, 3, {}, 1e-9)
    (graph,) = found.graphs
    safe = mask is window
    assert {a.spec.fill for a in attentions(graph)} == {0.0 if safe else fill}
    assert not squares(graph)


def test_a_window_sends_what_it_needs() -> None:
    """To the next rank the three rows before its own; a chunk that ends inside a rank none."""

    def meeting(predicate: str, order: str = "contiguous") -> blocks.Meeting:
        span = Span(Layout(4, order), 4, 15)
        return blocks.Meeting(AttentionSpec(True, predicate=predicate), span, span)

    found = keys.needed(meeting("(k + 3 >= q)"))
    assert found is not None
    assert [[list(r) for r in row] for row in found] == [
        [[(0, 4, 0)], [], [], []],
        [[(1, 4, 1)], [(0, 4, 4)], [], []],
        [[], [(1, 4, 5)], [(0, 4, 8)], []],
        [[], [], [(1, 4, 9)], [(0, 3, 12)]],
    ]
    found = keys.needed(meeting("((k // 8) == (q // 8))"))
    assert found is not None
    assert [[len(r) for r in row] for row in found] == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]
    assert keys.needed(meeting("(d0[k] == d0[q])", "zigzag")) is None


def test_the_plan_tells_predicates_and_blocks() -> None:
    text = str(tspc.plan(Model(packed, layers=1), inputs(256), ranks=2))
    (line,) = (x for x in text.splitlines() if x.startswith("attention: "))
    assert "(q >= k) & (cumsum[k] == cumsum[q]); blocks of 64 by rank: 5 5 of 8" in line
    text = str(tspc.plan(Model(window, layers=1), inputs(256), ranks=4))
    assert "(q >= k) & (k + 3 >= q); blocks of 64 by rank: 1 2 2 2 of 4" in text
    assert "layout contiguous" in text


def test_one_graph_for_all_lengths(small_blocks: None) -> None:
    """A size of the program is part of the predicate."""

    def half(x: Tensor, pad: Tensor) -> Tensor:
        q, k = positions(x)
        return (k <= q) | (k < x.shape[2] // 2)

    torch.manual_seed(0)
    model = Model(half, layers=1).double()
    made: list[Simulated] = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=simulated_backend(3, graphs=made), dynamic=True)
    with Widen():
        for length in (12, 15, 31):
            mine, one = compiled(*inputs(length)), model(*inputs(length))
            assert torch.allclose(mine, one, rtol=1e-9, atol=1e-9)
    (graph,) = (g for g in made if g.rewritten.folds)
    assert {a.spec.predicate for a in attentions(graph)} == {"(((s0 // 2) >= k + 1) | (q >= k))"}


def test_data_tells_which_blocks_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of whole blocks: no query's block meets another's."""
    monkeypatch.setattr(blocks, "EDGE", 128)
    data = (torch.arange(1024) // 256).view(1, 1, -1)
    span = Span(Layout(2), 512, 1024)
    meeting = blocks.Meeting(AttentionSpec(True, predicate="(d0[k] == d0[q])"), span, span)
    q = torch.zeros(1, 1, 512, 1)
    runs = list(blocks.Blocks(meeting, Operands(q, q, q, data=data), (1,)).runs())
    assert [(b.k0, b.k1) for run, _ in runs for b in run.blocks] == [
        (512, 640),
        (512, 640),
        (640, 768),
        (768, 896),
        (768, 896),
        (896, 1024),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_number_is_as_a_tensor_holds_it(dtype: torch.dtype) -> None:
    made = torch.Generator().manual_seed(0)
    scales = torch.logspace(-50, 50, 4000, dtype=torch.float64)
    values = (torch.randn(4000, generator=made, dtype=torch.float64) * scales).tolist()
    values += [
        0.0,
        -0.0,
        float("inf"),
        -float("inf"),
        65504.0,
        65520.0,
        3.4e38,
        -3.4028235e38,
        1e-45,
    ]
    for v in values:
        assert held(v, dtype) == float(torch.tensor(v, dtype=dtype)), v
    assert math.isnan(held(float("nan"), dtype))
