"""Which blocks of queries and keys an attention computes, and under which mask."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tspc.ir.layout import Layout, Span
from tspc.ir.spec import AttentionSpec, Operands
from tspc.masks.predicate import mask as predicate
from tspc.ops.counter import kept_keys
from tspc.runtime.attention import blocks as module
from tspc.runtime.attention.blocks import Block, Blocks, Meeting, View, counted

Tensor = torch.Tensor
LENGTH = 22


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four."""
    monkeypatch.setattr(module, "_edge", lambda m: 4)
    for cached in (module._plain, module._known):
        cached.cache_clear()


def meeting(spec: AttentionSpec, ranks: int = 2, order: str = "contiguous") -> Meeting:
    layout = Layout(ranks, order)
    span = Span(layout, int(layout.chunk_rows(LENGTH)), LENGTH)
    return Meeting(spec, span, span)


def operands(rows: int, **others: Tensor) -> Operands[Tensor]:
    q = torch.zeros(2, 3, rows, 4, dtype=torch.float64)
    k = torch.zeros(2, 3, LENGTH, 4, dtype=torch.float64)
    return Operands(q, k, k, **others)


def hidden(blocks: Blocks) -> Tensor:
    """Bool [2, queries, keys]: what the blocks hide, as a whole."""
    rows = blocks.operands.q.shape[2]
    out = torch.ones(2, rows, LENGTH, dtype=torch.bool)
    for run, top in blocks.runs():
        for b in run.blocks:
            view = blocks.view(run, b, top, torch.float64)
            seen = torch.ones(2, b.q1 - b.q0, b.k1 - b.k0, dtype=torch.bool)
            if view.causal:
                seen = seen.tril()
            if view.mask is not None:
                keep = view.mask if view.mask.dtype == torch.bool else view.mask > -math.inf
                seen = seen & keep.expand(2, 1, *seen.shape[1:])[:, 0]
            out[:, b.q0 : b.q1, b.k0 : b.k1] &= ~seen
    return out


SPECS = {
    "all": AttentionSpec(),
    "causal": AttentionSpec(causal=True),
    "window": AttentionSpec(causal=True, predicate="(k + 3 >= q)"),
    "data": AttentionSpec(predicate="(d0[k] == d0[q])"),
    "sizes": AttentionSpec(predicate="(k + s0 >= q)", sizes=(2,)),
}
DATA = torch.arange(LENGTH).div(5, rounding_mode="floor")[None, None].repeat(2, 1, 1)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_what_is_hidden_is_what_the_predicate_says(name: str, order: str) -> None:
    m = meeting(SPECS[name], 2, order)
    for rank in range(2):
        layout = m.queries.layout
        at = layout.positions(rank, m.queries.rows, LENGTH)
        data = DATA if name == "data" else None
        x = operands(len(at), **({"data": data} if data is not None else {}))
        got = hidden(Blocks(m, x, tuple(layout.chunk_ids(rank))))
        wanted = torch.zeros(2, len(at), LENGTH, dtype=torch.bool)
        for text in m.spec.texts:
            keep = predicate(text, at, torch.arange(LENGTH), m.spec.sizes, data)
            wanted |= ~keep.expand(2, 1, -1, -1)[:, 0]
        real = layout.valid(rank, m.queries.rows, LENGTH)
        assert torch.equal(got[:, real], wanted[:, real])


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_mask_and_a_predicate_hold_together(kind: str) -> None:
    m = meeting(SPECS["causal"], 1)
    x = torch.arange(LENGTH) % 3 != 0
    mask = x.expand(2, 1, LENGTH, LENGTH)
    if kind == "added":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    got = hidden(Blocks(m, operands(m.queries.local, mask=mask), (0,)))
    at = torch.arange(LENGTH)
    assert torch.equal(got[0, :LENGTH], ~((at[:, None] >= at) & x))


def test_empty_blocks_are_left_out_and_full_ones_have_no_mask() -> None:
    m = meeting(SPECS["window"], 1)
    (run, *_), runs = [r for r, _ in Blocks(m, operands(24), (0,)).runs()], None
    assert (run.q0, run.q1, run.first) == (0, 4, 0) and runs is None
    every = [b for r, _ in Blocks(m, operands(24), (0,)).runs() for b in r.blocks]
    assert all(b.k1 <= b.q1 + 4 for b in every) and all(b.k1 > b.q0 - 4 for b in every)
    count, whole, edge = counted(m, (0,))
    assert (whole, edge) == (36, 4) and count < whole / 2
    plain = [
        b for r, _ in Blocks(meeting(SPECS["causal"]), operands(11), (1,)).runs() for b in r.blocks
    ]
    assert [(b.k0, b.k1, b.causal) for b in plain] == [(0, 11, False), (11, 22, True)]


def test_a_part_of_a_mask() -> None:
    b, mask = Block(1, 3, 2, 6), torch.arange(40).view(1, 1, 4, 10)
    assert torch.equal(b.of(mask), mask[..., 1:3, 2:6])
    assert torch.equal(b.of(mask[..., :1, :]), mask[..., :1, 2:6])
    assert b.of(mask[..., :1]).shape[-1] == 1


def test_dropped_keys_and_the_scale() -> None:
    spec = AttentionSpec(dropout=0.5, scale=2.0, score="aten.tanh(s)")
    m = meeting(spec, 1)
    states = torch.randint(0, 2**62, (2, 3, 22))
    blocks = Blocks(m, operands(22, states=states), (0,))
    ((run, top),) = blocks.runs()
    view = blocks.view(run, run.blocks[0], top, torch.float64)
    assert (view.scale, view.score) == (2.0, "aten.tanh(s)") and not view.is_plain
    assert view.factors is not None
    assert torch.equal(view.factors, kept_keys(states, 0, LENGTH, 0.5) * 2.0)
    assert View().is_plain and not View(top=states).is_plain


def test_low_numbers_are_taken_off() -> None:
    """Where a query sees nothing but a low fill its scores would be lost in it."""
    spec = AttentionSpec(predicate="(k >= q + 11)", fill=-1e30)
    m = meeting(spec, 1)
    runs = list(Blocks(m, operands(22), (0,)).runs())
    assert [top is None for _, top in runs][-1] is False
    run, top = runs[-1]
    assert top is not None and (top == torch.tensor(-1e30)).all()
    assert [(b.k0, b.k1) for b in run.blocks] == [(0, LENGTH)]
    safe = AttentionSpec(causal=True, fill=-1e30)
    assert all(top is None for _, top in Blocks(meeting(safe, 1), operands(22), (0,)).runs())
    mask = torch.full((2, 1, 22, LENGTH), -1e30, dtype=torch.float64)
    x = operands(22, mask=mask)
    assert all(t is not None for _, t in Blocks(meeting(safe, 1), x, (0,)).runs())


def test_bounds_of_data_are_read_again_when_it_changes() -> None:
    data = DATA.clone()
    first = module._bounds(data)
    assert module._bounds(data) is first
    data += 1
    assert module._bounds(data) is not first


def test_adjacent_chunks_are_one_segment() -> None:
    assert list(module._segments(5, (0, 3))) == [(0, 5, 0), (5, 10, 15)]
    assert list(module._segments(5, (1, 2, 4))) == [(0, 10, 5), (10, 15, 20)]
    assert math.ceil(LENGTH / 4) == 6 and len(list(itertools.pairwise((1, 2)))) == 1
