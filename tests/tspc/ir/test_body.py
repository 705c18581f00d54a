"""The body of a fold as data: its text, what it saves and reads, and sizes at a call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from tests.support.programs import mlp_program, unit_of
from tests.support.tiny import Attention, proved
from tspc.base.hardware import HARDWARE
from tspc.ir import body as module
from tspc.ir.body import (
    BODIES,
    ROWS,
    Body,
    Extent,
    evaluate,
    numel,
    recomputing,
    registered,
    rows_of,
    symbol_values,
)
from tspc.ir.layout import Layout
from tspc.ir.program import Type
from tspc.ir.text import fields_of

S = sympy.Symbol("s", positive=True, integer=True)


@pytest.fixture(scope="module")
def mlp() -> Body:
    return unit_of(mlp_program(), "pieces").bodies["m"]


@pytest.fixture(scope="module")
def attention() -> Body:
    (graph,) = proved(Attention(), 2)
    (body,) = graph.rewritten.bodies.values()
    return body


def test_rows_have_names() -> None:
    assert rows_of(0) is ROWS and str(rows_of(2)) == "rows2" and rows_of(1) == rows_of(1)


def test_an_extent() -> None:
    e = Extent(2 * S, "zigzag")
    assert e.layout(2) == Layout(2, "zigzag") and e.chunk_rows(2, {S: 5}) == 3
    assert e.rows(2, {S: 5}) == 6 and Extent(7, "contiguous").rows(2, {}) == 4


def test_the_text(mlp: Body) -> None:
    text = fields_of(mlp)
    assert text.startswith("Body(symbols=(), extents=(Extent(length=7, order='contiguous'),)")
    assert "  %v0: f32[2, rows, 3] grad = aten.matmul.default(%token0, %shard0)\n" in text
    assert "'shard0': f32[6, 3] grad" in text and "shards=('shard0', 'shard1')" in text
    assert fields_of(replace(mlp, name="other")) == text
    assert mlp.text() == f"symbol rows positive integer\nbody 'm' {text}"


def test_the_key_is_the_hash_of_the_text(mlp: Body) -> None:
    key = replace(mlp, name="other", compiled={"pieces": 1}).key
    assert key == mlp.key and len(key) == 20
    changed = [
        {"units": 4},
        {"ranks": 3},
        {"schedule": "ring"},
        {"reduce": torch.float32},
        {"hardware": HARDWARE["h100"]},
        {"extents": (Extent(7, "zigzag"),)},
        {"values": {**mlp.values, "v0": Type((2, ROWS, 3), torch.float64)}},
        {"tokens": (replace(mlp.tokens[0], whole=True),)},
        {"outs": (replace(mlp.outs[0], kind="stack"),)},
        {"symbols": (S,)},
        {"symbols": (sympy.Symbol(str(S)),)},
    ]
    others = {replace(mlp, **change).key for change in changed}  # type: ignore[arg-type]
    assert len(others) == len(changed) and key not in others


def test_its_parts(mlp: Body, attention: Body) -> None:
    assert mlp.sizes == (ROWS,) and mlp.attentions == () and len(mlp.pieces) == 1
    (a,) = attention.attentions
    assert attention.steps[1] is a and len(attention.pieces) == 2
    assert mlp.saves == ("v0",) and attention.saves[:2] == (a.out, a.lse)
    assert mlp.weight_elements == 2 * 6 * 3
    assert mlp.real_steps() == 2 and replace(mlp, ranks=3, units=1, size=2).real_steps() == 2


def test_the_body_that_recomputes(mlp: Body, attention: Body) -> None:
    for body in (mlp, attention):
        other = recomputing(body)
        assert other.key != body.key and other.key == recomputing(body).key and other.spared == 0
        assert all(p.saves == () for p in other.pieces) and other.attentions == body.attentions
        assert other.values == body.values and other.compiled is not body.compiled


def test_one_object_for_each_key(mlp: Body) -> None:
    again = unit_of(mlp_program(), "pieces").bodies
    first = registered({"a": mlp})["a"]
    assert registered(again)["m"] is first and BODIES[mlp.key] is first


def test_sizes_at_a_call() -> None:
    assert evaluate(3, {}) == 3 and evaluate(sympy.Integer(4), {}) == 4
    assert evaluate(2 * S + ROWS, {S: 3, ROWS: 4}) == 10
    assert evaluate(S * ROWS, {S: S, ROWS: ROWS}) == S * ROWS  # over symbols
    assert module._symbols(S * ROWS) == (ROWS, S)
    assert module._interpreted(S + 1, (2,)) == 3
    assert numel((2, S, 3), {S: 4}) == 24 and numel((), {}) == 1


def test_the_symbols_at_a_call(mlp: Body, attention: Body) -> None:
    assert symbol_values(mlp, [], [4]) == {ROWS: 4}
    assert [*symbol_values(attention, [], [4]).values()] == [4] and torch.is_grad_enabled()
