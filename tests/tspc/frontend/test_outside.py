"""Graphs that hold no part of a model."""

from __future__ import annotations

import torch

from tests.support.group import alone, cut
from tspc.frontend.outside import only_shards
from tspc.ops import library  # noqa: F401  the ops of tspc


def graph(*targets: object) -> torch.fx.GraphModule:
    g = torch.fx.Graph()
    x = g.placeholder("x")
    for t in targets:
        x = g.call_function(t, (x,))  # type: ignore[arg-type]
    g.output(x)
    return torch.fx.GraphModule({}, g)


def test_shards_and_no_weight_of_a_module() -> None:
    with alone() as mesh:
        shard = cut(torch.ones(2), mesh)
        assert only_shards(graph(torch.tanh), [torch.ones(2), shard])
        assert not only_shards(graph(torch.tanh), [torch.ones(2)])
        for target in (torch.ops.tspc.whole_weight, torch.ops.tspc.whole_weight.default):
            assert not only_shards(graph(torch.tanh, target), [shard])
