"""One piece of a body: a plain function on one shard's tensors, with neutral pads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.programs import mlp_program, program_of, unit_of
from tests.support.tiny import Head, proved
from tspc.factors.factor import Factors
from tspc.ir.body import Body, rows_of
from tspc.ir.program import Ref
from tspc.passes.analyse.sizes import Sizes
from tspc.passes.lower.run_piece import Maker, Table, _Kept, _neutral, plain, runner

Tensor = torch.Tensor


def body_of(unit: Any) -> Body:
    (body,) = unit.bodies.values()
    return body


def run(body: Body, number: int, step: int, kept: dict[str, Tensor], **values: Tensor) -> Any:
    return body.pieces[number].run({rows_of(0): 4}, torch.tensor(step), values, kept)


def test_one_shard_of_two_products() -> None:
    body = body_of(unit_of(mlp_program(), "pieces"))
    x, up, down = torch.randn(2, 4, 6), torch.randn(6, 3), torch.randn(3, 6)
    env = run(body, 0, 0, {}, token0=x, shard0=up, shard1=down)
    torch.testing.assert_close(env["v2_0"], torch.tanh(x @ up) @ down)
    torch.testing.assert_close(env["v0_0"], x @ up)


def test_a_saved_value_stands_for_the_one_made() -> None:
    body = body_of(unit_of(mlp_program(), "pieces"))
    up = torch.randn(6, 3, requires_grad=True)
    x, kept = torch.randn(2, 4, 6), torch.randn(2, 4, 3)
    env = run(body, 0, 0, {"v0_0": kept}, token0=x, shard0=up, shard1=torch.randn(3, 6))
    torch.testing.assert_close(env["v1_0"], kept.tanh())
    (got,) = torch.autograd.grad(env["v1_0"].sum(), up)
    torch.testing.assert_close(got, torch.einsum("bsi,bsj->ij", x, 1 - kept.tanh() ** 2))
    value = torch.zeros(2, requires_grad=True)
    y = _Kept.apply(torch.ones(2), value)
    y.backward(torch.tensor([3.0, 4.0]))
    assert y.tolist() == [1, 1] and value.grad is not None and value.grad.tolist() == [3, 4]


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


@pytest.fixture
def maker() -> Maker:
    factors = Factors()
    fold: Any = type("Fold", (), {})()
    fold.factor, fold.units, fold.size = factors.new(5), 3, 5
    leaf = factors.new(7)
    return Maker(fold, factors, (leaf,), {}, 2)


def test_what_a_maker_tells(maker: Maker) -> None:
    (leaf,), h = maker.leaves, maker.fold.factor
    other = maker.factors.new(2)
    dims: Any = [(other,), (leaf,), (h, other)]
    assert maker.sequence(dims) == 0 and maker.has_units(dims)
    assert not maker.has_units([(leaf,)])
    assert maker.shape(dims, [], False) == (2, rows_of(0), 6)
    assert maker.shape(dims, [], True) == (2, rows_of(0), 10)
    assert maker.rows({}) == {leaf: rows_of(0)} and maker.rows({rows_of(0): 4}) == {leaf: 4}
    sizes = maker.sizes({rows_of(0): 4})
    assert [sizes.dim(d) for d in dims] == [2, 4, 6]
    with pytest.raises(AssertionError, match="no sequence in these dims"):
        maker.sequence([(other,)])
    assert type(plain(sizes.factors.size((other,)))) is int and plain(rows_of(0)) == rows_of(0)


def test_neutral_pads(maker: Maker) -> None:
    h, other = maker.fold.factor, maker.factors.new(2)
    sizes = Sizes(maker.factors, {}, {h: 3})
    x = torch.ones(2, 6)
    first = _neutral(maker, x, 1, (h, other), sizes, torch.tensor(0), 0.0)
    last = _neutral(maker, x, 1, (h, other), sizes, torch.tensor(1), 0.0)
    assert torch.equal(first, x) and last[0].tolist() == [1, 1, 1, 1, 0, 0]
    turned = _neutral(maker, x, 1, (other, h), sizes, torch.tensor(1), -torch.inf)
    assert turned[1].tolist() == [1, 1, -torch.inf] * 2


def test_copies_and_tables(maker: Maker) -> None:
    """What an exchange reads of an operand is its units of the shard, under a name of its own."""
    maker.names[Ref("k")] = "token0"
    table = Table(1, [[0, 1, 2], [3, 4, 4]])
    assert table.tensor.tolist() == table.rows
    fn = runner(maker, [], {Ref("k"): table}, {"token0": "token0_cut"})
    k = torch.arange(5.0).expand(2, 5)
    env = fn({}, torch.tensor(1), {"token0": k}, {})
    assert env["token0_cut"][0].tolist() == [3, 4, 4]


def test_a_sum_over_units_clears_its_pads() -> None:
    def fn(x: Tensor, up: Tensor) -> list[Tensor]:
        return [torch.exp(x @ up).sum(-1)]

    unit = unit_of(program_of(fn, torch.zeros(2, 7, 6), params={"up": torch.zeros(6, 5)}), "pieces")
    body = body_of(unit)
    x, up = torch.randn(2, 4, 6), torch.randn(6, 3)
    for step, real in ((0, 3), (1, 2)):
        env = run(body, 0, step, {}, token0=x, shard0=up)
        torch.testing.assert_close(env[body.outs[0].name], torch.exp(x @ up[:, :real]).sum(-1))
