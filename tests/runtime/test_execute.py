"""tspc's ops on ranks: what each generator does, its results contiguous and of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.group import alone
from tests.support.ranks import AXIS, on_ranks
from tests.support.tiny import Attention, Mlp, proved
from tspc.base.options import parse
from tspc.ir.layout import Layout
from tspc.ir.spec import AttentionSpec
from tspc.runtime import execute
from tspc.runtime.comm.drivers import lockstep
from tspc.runtime.comm.failures import Lost
from tspc.runtime.comm.place import Place
from tspc.runtime.comm.requests import Axis
from tspc.runtime.execute import GENERATORS
from tspc.runtime.mesh import resolve

ops = torch.ops.tspc
Tensor = torch.Tensor


def test_a_varied_value_is_contiguous() -> None:
    """As its fake says, also where the value is not."""
    x = torch.arange(12.0).view(3, 4).t()
    for (y,) in lockstep(
        [GENERATORS["vary"](Axis("tsp", 2, r), [x], None, "tsp") for r in range(2)]
    ):
        assert y.is_contiguous() and torch.equal(x, y)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture
def place() -> Iterator[Place]:
    with alone():
        yield resolve(parse(None), torch.device("cpu"))[0]


LAYOUT = (1, 1, 1, 4, 4, "contiguous")
ATTENTION = (*AttentionSpec(causal=True).all[:-1], [], [4, 4], [4, 4], ["contiguous"] * 2)


def on_one_rank(name: str) -> list[tuple[Any, Any]]:
    """(what an op gives over a group of one rank, what it is to give)."""
    x, q, ids = draw(2, 4, 3), draw(1, 2, 4, 3), torch.tensor([[3, 0, 1, 2]])
    table, pad = draw(4, 3), torch.nn.functional.pad
    out, lse = ops.attention(q, q, q, None, None, None, *ATTENTION, name)
    leaves = [q.clone().requires_grad_() for _ in range(3)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    grads = torch.autograd.grad(wanted, leaves, q)
    at = (0, 1, 1, 4, 4, "contiguous", name)
    typed = (torch.float64, None, name)
    attended = (q, q, q, q, None, None, None, out, lse, False, *ATTENTION, name)
    rows = (4, 4, "contiguous", name)
    return [
        *((getattr(ops, n)(x, *LAYOUT, name), x) for n in ("whole", "local", "clear_pads")),
        *((getattr(ops, n)(x, *LAYOUT, name), x) for n in ("whole_backward", "local_backward")),
        (ops.all_reduce(x, name), x),
        (ops.vary([x], None, name)[0], x),
        (ops.vary_backward([x], None, name)[0], x),
        (ops.gather_weight(table, 0, 3, False, *typed), table[:3]),
        (ops.gather_weight_backward(table[:3], 0, 4, True, *typed), pad(table[:3], (0, 0, 0, 1))),
        (ops.embed(table, ids, -1, False, torch.float64, *rows), table[ids]),
        (
            ops.embed_backward(table[ids], ids, 4, -1, False, torch.float64, *rows),
            table,
        ),
        (ops.extend(x[0, :, 0], 1, 0, "zeros", *at), pad(x[0, :, 0], (1, 0))),
        (ops.extend_backward(x[0, :, 0], 0, 0, "zeros", *at), x[0, :, 0]),
        (ops.carry(x[0, :1, 0], 0, 1, False, "contiguous", name), torch.zeros(1).double()),
        (out, wanted.detach()),
        *zip(ops.attention_backward(*attended), grads),
        (ops.whole_weight(table, 0, 4, False, name), table),
        (ops.whole_weight(table, -1, 0, False, name), table),
        (ops.whole_weight_backward(table, 0, 4, False, name, 4), table),
    ]


def test_ops_over_a_process_group(place: Place) -> None:
    for number, (got, wanted) in enumerate(on_one_rank(place.axis.name)):
        torch.testing.assert_close(got, wanted, msg=lambda m, n=number: f"{n}: {m}")
        assert got.is_contiguous()


def test_convolutions_of_tiles_on_ranks() -> None:
    x, w = draw(1, 2, 6), draw(3, 2, 3)
    wanted = torch.nn.functional.conv1d(x, w)
    (y,), _ = on_ranks(lambda a, b: [ops.tile_conv(a, b, None, 1, 1, 1, AXIS)], [[x, w]] * 2)
    torch.testing.assert_close(y, wanted)
    wanted_of = [True, False, False]
    (dx,), _ = on_ranks(
        lambda g, a, b: ops.tile_conv_backward(g, a, b, 1, 1, 1, wanted_of, AXIS),
        [[wanted, x, w]] * 2,
    )
    assert dx.shape == x.shape


@pytest.mark.parametrize("schedule", ["ring", "stationary"])
def test_folds_on_ranks(schedule: str) -> None:
    for model in (Mlp(), Attention()):
        assert len(proved(model, 2, schedule=schedule)) == 1


def test_results_have_memory_of_their_own() -> None:
    x = torch.arange(6.0).view(2, 3)
    got = execute._apart([x, x.t(), x[0], x + 1], [x])
    assert all(y.is_contiguous() for y in got)
    pointers = [y.untyped_storage().data_ptr() for y in (x, *got)]
    assert len(set(pointers)) == 5 and torch.equal(got[1], x.t())


def test_where_a_fold_waits() -> None:
    (graph,) = proved(Mlp(), 2)
    (body,) = graph.rewritten.bodies.values()
    shards = [torch.zeros([int(s) for s in body.values[n].shape]) for n in body.shards]
    sizes = [7] * len(body.symbols)
    f = execute.FoldCall([], [], shards, sizes, [4], [7], "mlp", body.key, "t")
    call = execute._call(Axis("t", 2, 0), f)
    assert call.layouts == [Layout(2)] and call.schedule in ("ring", "stationary")
    assert execute._where("mlp", call) == f"region 'mlp' ({call.schedule})"
    call.turn = 2
    assert execute._where("mlp", call).endswith(", step 2 of 2)")


def test_a_rank_that_does_not_come_is_told_the_region() -> None:
    (graph,) = proved(Mlp(), 2)
    (body,) = graph.rewritten.bodies.values()
    shards = [torch.zeros([int(s) for s in body.values[n].shape]).double() for n in body.shards]
    tokens = [draw(2, 7, 6)]
    held = [torch.zeros([int(s) for s in body.values[n].shape]).double() for n in body.invariants]
    values = (tokens, held, shards, [2] * len(body.symbols), [4], [7], "mlp", body.key, "t")
    steps = GENERATORS["fold"](Axis("t", 2, 0), *values)
    next(steps)
    with pytest.raises(Lost) as caught:
        steps.throw(Lost(RuntimeError("gone"), "Shift of weights"))
    assert caught.value.places and caught.value.places[0].startswith("region 'mlp' (")
