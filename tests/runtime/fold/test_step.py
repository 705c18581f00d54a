"""One call of a fold: its rows and shards, sums that leave what was given, exchanges once per call
or per shard."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny import Attention, Mlp, proved
from tspc.ir.body import Body
from tspc.ir.layout import Layout, Span
from tspc.runtime.comm.drivers import record
from tspc.runtime.comm.requests import Axis
from tspc.runtime.fold.pieces import EagerPieces
from tspc.runtime.fold.step import Call, Sums, in_operand_order


def test_sums_take_the_first_and_never_write_to_it() -> None:
    sums, a, b = Sums(), torch.ones(2), torch.full((2,), 2.0)
    sums.add("x", a)
    assert sums["x"] is a
    sums.add("x", b)
    sums.add("x", b)
    assert sums["x"].tolist() == [5, 5] and a.tolist() == [1, 1] and b.tolist() == [2, 2]
    assert sums.take("x") is not None and sums.take("x") is None and "x" not in sums
    sums.add("x", a)
    sums.add("x", b)
    assert a.tolist() == [1, 1]
    half = Sums()
    half.add("y", torch.ones(1, dtype=torch.bfloat16))
    assert half["y"].dtype == torch.float32


def body_of(model: torch.nn.Module, ranks: int = 2) -> Body:
    (graph,) = proved(model, ranks)
    (body,) = graph.rewritten.bodies.values()
    return body


def call_of(body: Body, rank: int = 1) -> Call:
    ranks = body.ranks
    shapes = {n: [int(s) for s in body.values[n].shape] for n in body.shards}
    shards = [torch.arange(float(torch.Size(s).numel())).double().view(s) for s in shapes.values()]
    sizes = [7] * len(body.symbols)
    return Call(
        Axis("t", ranks, rank), body, EagerPieces(body), "ring", [], [], shards, sizes, [4], [7]
    )


def test_sizes_of_a_call() -> None:
    call = call_of(body_of(Mlp()))
    assert call.layouts == [Layout(2)] and call.span(0) == Span(Layout(2), 4, 7)
    assert call.symbols(2)[call.body.sizes[-1]] == 8 and call.symbols() is call.symbols()
    token = call.body.tokens[0].name
    assert call.shape(token)[1] == 4 and call.shape(token, 2)[1] == 8
    assert call.lead(3) == 3 and call.step(1).item() == 1


def test_shards_in_one_buffer_and_back() -> None:
    call = call_of(body_of(Mlp()))
    assert call.sent == torch.float64
    flat = call.flat()
    assert flat.numel() == call.buffer().numel() == sum(s.numel() for s in call.shards)
    for got in (call.unpack(flat), call.own()):
        assert list(got) == list(call.body.shards)
        assert all(torch.equal(x, s) for x, s in zip(got.values(), call.shards))


def test_what_the_backward_takes_by_blocks_of_ranks() -> None:
    body = body_of(Attention())
    call = call_of(body)
    values = {n: torch.randn(call.shape(n, 2), dtype=torch.float64) for n in body.saves}
    saved = call.saved(values)
    assert [x.shape[0] for x in saved] == [2] * len(body.saves)
    again = call.restored(saved)
    assert all(torch.equal(again[n], x) for n, x in values.items())


def test_gradients_are_in_the_order_and_type_of_operands() -> None:
    body = body_of(Mlp())
    call = call_of(body)
    first, *others = body.shards
    g = torch.ones(call.shards[0].shape)
    tokens, invariants, shards = in_operand_order(call, {}, {first: g})
    assert tokens == [] and all(x is not None for x in shards)
    assert shards[0].dtype == torch.float64 and (shards[0] == 1).all()
    assert all(not x.any() for x in shards[1:]) and len(shards) == 1 + len(others)
    assert len(invariants) == 0


@pytest.mark.parametrize("kv,per_call", [(3, False), (1, True)])
def test_keys_are_exchanged_per_shard_or_once(kv: int, per_call: bool) -> None:
    """In the forward and again in the backward."""
    with record() as sent:
        (graph,) = proved(Attention(3, kv), 3, schedule="ring")
    gathers = [s for s in sent if s.kind == "AllGather" and len(s.shape) == 4]
    assert len(gathers) == (2 if per_call else 6) and len(graph.rewritten.folds) == 1


@pytest.mark.parametrize("schedule", ["ring", "stationary"])
def test_sinks_of_the_heads_of_a_shard(schedule: str) -> None:
    (graph,) = proved(Attention(sinks=True), 3, schedule=schedule)
    (body,) = graph.rewritten.bodies.values()
    assert body.attentions[0].operands.sinks is not None


def test_the_meeting_of_an_attention() -> None:
    body = body_of(Attention())
    call, (a,) = call_of(body), body.attentions
    m = call.meeting(a)
    assert m.spec.causal and m.queries == m.keys == Span(Layout(2, "zigzag"), 4, 7)
    assert not call.biased(a)
