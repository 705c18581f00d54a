"""The body of a fold: pieces between exchanges, operands, saved values, what products cost."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F

from tests.support.programs import Tensor, mlp_program, program_of, unit_of
from tspc.ir.body import ROWS, Attention, Body, Extent, Out, Piece, Token
from tspc.passes.lower.pieces import make_body


def attend(x: Tensor, q: Tensor, k: Tensor, o: Tensor) -> list[Tensor]:
    a, b = ((x @ w).unflatten(-1, (3, 2)).transpose(1, 2) for w in (q, k))
    y = F.scaled_dot_product_attention(a, b, b, is_causal=True)
    return [y.transpose(1, 2).flatten(2) @ o]


@pytest.fixture(scope="module")
def attention() -> Body:
    params = {n: torch.zeros(6, 6) for n in ("q", "k", "o")}
    (body,) = unit_of(
        program_of(attend, torch.zeros(2, 7, 6), params=params), "pieces"
    ).bodies.values()
    return body


def test_a_body_of_one_piece() -> None:
    unit = unit_of(mlp_program(), "propagate")
    (node,) = unit.folds
    body = make_body(node, unit, save=True)
    assert (body.name, body.ranks, body.units, body.size) == ("m", 2, 3, 5)
    assert body.extents == (Extent(7, "contiguous"),) and body.symbols == ()
    assert body.tokens == (Token("token0", 1, 1, False),) and body.invariants == ()
    assert body.shards == ("shard0", "shard1")
    (piece,) = body.pieces
    assert piece.reads == ("token0", "shard0", "shard1") and piece.saves == ("v0_0",)
    assert piece.writes == ("v2_0",) and body.outs == (Out("v2_0", "sum", 1, 1, True),)
    assert {n: v.shape for n, v in body.values.items()} == {
        "token0": (2, ROWS, 6),
        "shard0": (6, 3),
        "shard1": (3, 6),
        "v0_0": (2, ROWS, 3),
        "v1_0": (2, ROWS, 3),
        "v2_0": (2, ROWS, 6),
    }
    assert sympy.simplify(body.flops - 2 * 2 * ROWS * (6 * 3 + 3 * 6)) == 0
    assert body.inner == 2 * ROWS * 3 and body.spared == 2 * 2 * ROWS * 3 * 6
    again = make_body(node, unit, save=False)
    assert again.pieces[0].saves == () and again.spared == 0 and again.key != body.key


def test_a_body_is_cut_at_an_attention(attention: Body) -> None:
    before, exchange, after = attention.steps
    assert (
        isinstance(before, Piece) and isinstance(exchange, Attention) and isinstance(after, Piece)
    )
    assert (attention.units, attention.size) == (2, 3)
    operands = [n for n in exchange.operands.all if n is not None]
    assert set(operands) <= set(before.writes) and exchange.out in after.reads
    assert exchange.spec.causal and (exchange.queries, exchange.keys) == (0, 0)
    assert attention.values[exchange.lse].shape == attention.values[exchange.out].shape[:-1]
    assert attention.values[exchange.lse].dtype == torch.float32
    assert attention.saves[:2] == (exchange.out, exchange.lse)
    assert [e.order for e in attention.extents] == ["zigzag"]


def test_a_bias_is_read_by_units_and_an_exit_in_blocks() -> None:
    def fn(x: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> list[Tensor]:
        inner = torch.tanh(x @ up + bias)
        return [inner @ down, inner]

    shapes = {"up": (6, 5), "bias": (5,), "down": (5, 6)}
    params = {n: torch.zeros(s) for n, s in shapes.items()}
    (body,) = unit_of(program_of(fn, torch.zeros(2, 7, 6), params=params), "pieces").bodies.values()
    assert body.invariants == ("invariant0",) and body.values["invariant0"].shape == (5,)
    assert {o.kind for o in body.outs} == {"sum", "stack"}
    assert body.values["shard0"].shape == (6, 3)


def test_what_an_exchange_reads_without_an_op_between() -> None:
    """Keys from outside: their units of the shard are a value of the piece before."""

    def fn(x: Tensor, keys: Tensor, q: Tensor, o: Tensor) -> list[Tensor]:
        a = (x @ q).unflatten(-1, (3, 2)).transpose(1, 2)
        return [F.scaled_dot_product_attention(a, keys, keys).transpose(1, 2).flatten(2) @ o]

    params = {n: torch.zeros(6, 6) for n in ("q", "o")}
    program = program_of(fn, torch.zeros(2, 7, 6), torch.zeros(2, 3, 7, 2), params=params)
    bodies = unit_of(program, "pieces").bodies
    cuts = [n for b in bodies.values() for n in b.values if n.endswith("_cut")]
    for body in bodies.values():
        assert all(body.values[n].shape[1] == 2 for n in cuts)
        assert set(cuts) <= set(body.pieces[0].writes)
