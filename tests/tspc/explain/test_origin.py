"""Each decision can be asked for where it comes from."""

from __future__ import annotations

import pytest
import torch

import tspc
from examples.llama_like import LlamaLike
from tests.support.programs import mlp_program, unit_of
from tspc.explain.origin import origin

TOKENS = torch.zeros(2, 12, dtype=torch.long)
TOLD = {
    "blocks.0.attention": [
        "over 6 pieces of blocks.0.attention.o.weight.1, 2 in each of 4 shards, 2 of them pads",
        "weight blocks.0.attention.o.weight: cut along dim 1",
        "leaves as a sum",
        "by the cost model: stationary",
    ],
    "head": ["schedule ring, by the options"],
    "blocks.0.mlp.up.weight": ["cut along dim 0", "by region blocks.0.mlp", "read by %linear"],
    "embedding.weight": ["its rows are looked up where they lie"],
    "norm.weight": ["whole on every rank"],
    "%linear": ["inside of region blocks.0.attention"],
}


@pytest.mark.parametrize("name", TOLD)
def test_a_name(name: str) -> None:
    model = LlamaLike(layers=1, heads=6, kv_heads=6)
    plan = tspc.plan(model, (TOKENS, TOKENS), ranks=4, options={"schedule": {"head": "ring"}})
    text = plan.origin(name)
    assert all(t in text for t in TOLD[name]), text


def test_values() -> None:
    plan = tspc.plan(LlamaLike(layers=1), (TOKENS, TOKENS), ranks=2)
    nodes = plan.rewritten.typed.program.nodes
    (total,) = (n for n in nodes if n.op == "all_reduce")
    text = plan.origin(total.name)
    assert "meets the sequence: reduce" in text and "a partial sum on each rank" in text
    for n in nodes[:-1]:  # every line of the plan
        assert plan.origin(n.name)
    with pytest.raises(tspc.PlanError, match="'nothing' in this program; its regions are b"):
        plan.origin("nothing")


def test_of_a_unit() -> None:
    unit = unit_of(mlp_program(), "localize")
    assert origin(unit, "m", {}) == origin(unit, "%fold_0", {})
    assert origin(unit, "m", {}).startswith("region m: sums over 5 pieces of ")
    assert "m.up" in origin(unit, "m.up", {}) and "x0" in origin(unit, "x0", {})
    inside = "%matmul is computed inside of region m, for one shard at a time"
    assert origin(unit, "matmul", {}) == inside
    with pytest.raises(tspc.PlanError, match="no region, parameter or value 'z' in this program; "):
        origin(unit, "z", {})
