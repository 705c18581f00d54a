"""A graph on all ranks in lockstep: ordinary ops per rank, tspc's together."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.support.ranks import AXIS
from tspc.base.errors import RankMismatchError
from tspc.runtime import simulate

ops = torch.ops.tspc
XS = [torch.arange(6.0).view(2, 3) + 10 * r for r in range(3)]


def graph(fn: Any, *inputs: torch.Tensor) -> torch.fx.GraphModule:
    return make_fx(fn, tracing_mode="fake")(*inputs)


def test_ops_of_ranks_and_what_they_share() -> None:
    def fn(x: torch.Tensor) -> list[torch.Tensor]:
        total = ops.all_reduce(x * 2, AXIS)
        return [total, x.t().contiguous().view(6)]

    out = simulate.run(graph(fn, XS[0]), AXIS, [[x] for x in XS])
    assert len(out) == 3
    for r, (total, flat) in enumerate(out):
        assert torch.equal(total, sum(XS) * 2) and torch.equal(flat, XS[r].t().flatten())


def test_constants_and_keywords() -> None:
    g = torch.fx.Graph()
    x, held = g.placeholder("x"), g.get_attr("held")
    added = g.call_function(torch.ops.aten.add.Tensor, (x, held))
    varied = g.call_function(ops.vary.default, ([x],), {"reduce": None, "axis": AXIS})
    g.output([added, g.call_function(operator.getitem, (varied, 0))])
    gm = torch.fx.GraphModule({"held": torch.ones(3)}, g)
    for r, (a, b) in enumerate(simulate.run(gm, AXIS, [[x] for x in XS])):
        assert torch.equal(a, XS[r] + 1) and torch.equal(b, XS[r])


def test_values_are_let_go_after_their_last_use() -> None:
    gm = graph(lambda x: [(x + 1).sin().sum()], XS[0])
    alive: list[int] = []
    plain = simulate.arguments

    def counted(a: Any, env: dict[Any, Any]) -> Any:
        alive.append(len(env))
        return plain(a, env)

    simulate.arguments, before = counted, simulate.arguments
    try:
        simulate.run(gm, AXIS, [[XS[0]]])
    finally:
        simulate.arguments = before
    assert max(alive) <= 2


def test_a_graph_that_ranks_run_differently() -> None:
    gm = graph(lambda x: [ops.all_reduce(x, AXIS)], XS[0])
    with pytest.raises(RankMismatchError, match="rank 0 issues"):
        simulate.run(gm, AXIS, [[XS[0]], [XS[1][:1]]])


def test_a_graph_without_an_output() -> None:
    gm = torch.fx.GraphModule({}, torch.fx.Graph())
    with pytest.raises(AssertionError, match="a graph without output"):
        simulate.run(gm, AXIS, [[]])
