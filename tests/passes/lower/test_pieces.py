"""The body of a fold: pieces between exchanges, operands, saved values, what products cost."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F

from tests.support.programs import Tensor, mlp_program, program_of, unit_of
from tests.support.tiny import Head, proved
from tspc.base.options import parse
from tspc.factors.factor import Factors
from tspc.ir.body import ROWS, STEP, Attention, Body, Extent, Out, Piece, Token
from tspc.ir.builder import Builder
from tspc.ir.program import Node, Ref
from tspc.ops.run import Run, run_piece
from tspc.passes.lower.pieces import _Maker, make_body
from tspc.passes.lower.unit import Unit


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
    assert piece.reads == ("token0", "shard0", "shard1") and piece.saves == ("v0",)
    assert piece.writes == ("v2",) and body.outs == (Out("v2", "sum", 1, 1, True),)
    assert {n: v.shape for n, v in body.values.items()} == {
        "token0": (2, ROWS, 6),
        "shard0": (6, 3),
        "shard1": (3, 6),
        "v0": (2, ROWS, 3),
        "v1": (2, ROWS, 3),
        "v2": (2, ROWS, 6),
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


def keys(unit: Unit) -> list[str]:
    return [b.key for b in unit.bodies.values()]


def test_layers_of_one_structure_share_their_pieces() -> None:
    def layers(x: Tensor, *w: Tensor) -> list[Tensor]:
        for up, down in zip(w[::2], w[1::2]):
            x = x + torch.tanh(x @ up) @ down
        return [x]

    shapes = {"a.up": (6, 5), "a.down": (5, 6), "b.up": (6, 5), "b.down": (5, 6)}
    shapes |= {"c.up": (6, 4), "c.down": (4, 6)}
    params = {n: torch.zeros(s) for n, s in shapes.items()}
    a, b, c = keys(unit_of(program_of(layers, torch.zeros(2, 7, 6), params=params), "pieces"))
    assert a == b != c and len(a) == 20


def test_what_a_key_tells_apart() -> None:
    def key(units: int = 5, length: int = 7, ranks: int = 2, **options: object) -> str:
        (one,) = keys(unit_of(mlp_program(units, length), "pieces", ranks, options=parse(options)))
        return one

    assert key() == key()
    others = key(4), key(5, 8), key(ranks=3), key(schedule="ring"), key(layout="zigzag")
    others += (key(reduce_dtype=torch.float32), key(memory_budget="min"))
    assert key() not in others[:5] and len({*others[:5]}) == 5


def body_of(unit: Any) -> Body:
    (body,) = unit.bodies.values()
    return body


def run(body: Body, number: int, step: int, kept: dict[str, Tensor], **values: Tensor) -> Any:
    return run_piece(body.pieces[number], {ROWS: 4}, torch.tensor(step), values, kept)


def test_one_shard_of_two_products() -> None:
    body = body_of(unit_of(mlp_program(), "pieces"))
    x, up, down = torch.randn(2, 4, 6), torch.randn(6, 3), torch.randn(3, 6)
    env = run(body, 0, 0, {}, token0=x, shard0=up, shard1=down)
    torch.testing.assert_close(env["v2"], torch.tanh(x @ up) @ down)
    torch.testing.assert_close(env["v0"], x @ up)


def test_a_saved_value_stands_for_the_one_made() -> None:
    body = body_of(unit_of(mlp_program(), "pieces"))
    up = torch.randn(6, 3, requires_grad=True)
    x, kept = torch.randn(2, 4, 6), torch.randn(2, 4, 3)
    env = run(body, 0, 0, {"v0": kept}, token0=x, shard0=up, shard1=torch.randn(3, 6))
    torch.testing.assert_close(env["v1"], kept.tanh())
    (got,) = torch.autograd.grad(env["v1"].sum(), up)
    torch.testing.assert_close(got, torch.einsum("bsi,bsj->ij", x, 1 - kept.tanh() ** 2))


def test_units_of_a_step() -> None:
    """A bias is whole: each step reads its units, a pad the last one again."""

    def fn(x: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> list[Tensor]:
        return [torch.tanh(x @ up + bias) @ down]

    shapes = {"up": (6, 5), "bias": (5,), "down": (5, 6)}
    params = {n: torch.zeros(s) for n, s in shapes.items()}
    body = body_of(unit_of(program_of(fn, torch.zeros(2, 7, 6), params=params), "pieces"))
    x, bias, down = torch.zeros(2, 4, 6), torch.arange(5.0), torch.eye(3, 6)
    for step, units in enumerate(([0, 1, 2], [3, 4, 4])):
        values = {"token0": x, "shard0": torch.zeros(6, 3), "shard1": down, "invariant0": bias}
        env = run(body, 0, step, {}, **values)
        out = env[body.outs[0].name]
        torch.testing.assert_close(out[0, 0, :3], torch.tensor(units).float().tanh())


def test_a_log_sum_exp_and_a_pick() -> None:
    """Pads are -inf; of the labels those in this shard are picked."""
    (graph,) = proved(Head(), 2)
    (body,) = graph.rewritten.bodies.values()
    assert {o.kind for o in body.outs} == {"lse", "sum"}


def test_a_sum_over_units_clears_its_pads() -> None:
    def fn(x: Tensor, up: Tensor) -> list[Tensor]:
        return [torch.exp(x @ up).sum(-1)]

    unit = unit_of(program_of(fn, torch.zeros(2, 7, 6), params={"up": torch.zeros(6, 5)}), "pieces")
    body = body_of(unit)
    x, up = torch.randn(2, 4, 6), torch.randn(6, 3)
    for step, real in ((0, 3), (1, 2)):
        env = run(body, 0, step, {}, token0=x, shard0=up)
        torch.testing.assert_close(env[body.outs[0].name], torch.exp(x @ up[:, :real]).sum(-1))


@pytest.fixture
def maker() -> _Maker:
    factors = Factors()
    fold, typed = (type("Stand-in", (), {})() for _ in range(2))
    fold.factor, fold.units, fold.size = factors.new(5), 3, 5
    typed.factors = factors
    return _Maker(fold, typed, (factors.new(7),), 2)


def test_what_a_maker_tells(maker: _Maker) -> None:
    (leaf,), h, factors = maker.leaves, maker.fold.factor, maker.typed.factors
    other = factors.new(2)
    dims: Any = [(other,), (leaf,), (h, other)]
    assert maker.sequence(dims) == 0 and [maker.has_units(d) for d in dims] == [False, False, True]
    assert maker.sizes.shape(dims) == (2, ROWS, 6) and maker.whole.shape(dims) == (2, ROWS, 10)
    assert maker.table(dims).rows == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 8, 9]]
    with pytest.raises(AssertionError, match="no sequence in these dims"):
        maker.sequence([(other,)])


@pytest.mark.parametrize("turned", [False, True])
def test_neutral_pads(maker: _Maker, turned: bool) -> None:
    h, other = maker.fold.factor, maker.typed.factors.new(2)
    record: Any = type("Stand-in", (), {})()
    record.ins = [[(maker.typed.factors.new(2),), (other, h) if turned else (h, other)]]
    b = Builder()
    b.at(Node("n", ""))
    x = maker.neutral(b, Ref("x"), 1, record, -1.0)
    for step, wanted in enumerate(([1] * 6, [1, 1, -1] * 2 if turned else [1, 1, 1, 1, -1, -1])):
        values = {"x": torch.ones(2, 6), STEP: torch.tensor(step)}
        run = Run(values, {}, torch.device("cpu"))
        run.nodes(b.nodes)
        assert run.values[x.value].tolist() == [wanted] * 2


def test_an_operand_is_read_at_the_units_of_the_shard(maker: _Maker) -> None:
    k, h = Ref("k"), maker.fold.factor
    b = Builder()
    maker.units_of(b, k, maker.table([(maker.typed.factors.new(2),), (h,)]))
    assert b.use(k) == Ref("k_cut")
    values = {"k": torch.arange(5.0).expand(2, 5), STEP: torch.tensor(1)}
    run = Run(values, {}, torch.device("cpu"))
    run.nodes(b.nodes)
    assert run.values["k_cut"].tolist() == [[3, 4, 4]] * 2
