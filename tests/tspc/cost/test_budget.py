"""`memory_budget`: what is kept for the backward grows with it and stays within it, for any value
the result is one device's, and it is resolved once, at the sizes of the compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tspc
from examples.llama_like import LlamaLike
from tests.support.models import VOCABULARY, make, tokens_of
from tests.support.programs import mlp_program, unit_of
from tspc.backend.simulated import Simulated, simulated_backend
from tspc.base.options import parse
from tspc.cost import budget
from tspc.ir.body import recomputing

pytestmark = [pytest.mark.slow, pytest.mark.sampled(4)]

RANKS, LENGTH = 3, 13


def graph_of(value: Any, length: int = LENGTH) -> Simulated:
    """One forward of a model whose regions keep unlike amounts."""
    made: list[Simulated] = []
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = LlamaLike(VOCABULARY, 32, 2, 4, 2, 50)
    fn = torch.compile(
        model, backend=simulated_backend(RANKS, parse({"memory_budget": value}), made)
    )
    tokens = tokens_of(length)
    fn(tokens, tokens)
    return made[0]


def saved(graph: Simulated) -> int:
    """Elements of rank 0 that the forward left for the backward."""
    return graph.saved_elements


def test_what_is_kept_grows_with_the_share() -> None:
    most = saved(graph_of("max-speed"))
    least = saved(graph_of("min"))
    shares = [0.0, 0.2, 0.5, 0.8, 1.0]
    found = [saved(graph_of(s)) - least for s in shares]
    assert found == sorted(found) and len(set(found)) == 5
    assert found[0] == 0 and found[-1] == most - least
    for share, elements in zip(shares, found):
        assert elements <= share * (most - least)


def test_bytes_are_of_one_rank() -> None:
    least = saved(graph_of("min"))
    for value, most in ((30000, 30000), ("30 kB", 30000), ("20KiB", 20480), ("1GiB", 2**30)):
        graph = graph_of(value)
        used = 4 * (saved(graph) - least)
        assert 0 < used <= most
        assert used == sum(k.bytes(graph.sizes) for k in graph.rewritten.keepings if k.kept)
        left = [k.bytes(graph.sizes) for k in graph.rewritten.keepings if not k.kept]
        assert all(used + b > most for b in left)  # what would fit is kept


@pytest.mark.parametrize("schedule", ["auto", "stationary"])
@pytest.mark.parametrize("name", ["llama_like", "gpt2_like"])
def test_equals_one_device(name: str, schedule: str) -> None:
    tokens = tokens_of(LENGTH)
    options = {"memory_budget": 0.5, "schedule": schedule}
    found = tspc.verify(make(name), (tokens, tokens), {}, RANKS, options, 1e-9)
    (graph,) = found.graphs
    assert {k.kept for k in graph.rewritten.keepings} == {True, False}
    bodies = graph.rewritten.bodies
    for k in graph.rewritten.keepings:
        assert any(p.saves for p in bodies[k.name].pieces) == k.kept


def test_another_length_keeps_the_policy() -> None:
    made: list[Simulated] = []
    torch._dynamo.reset()
    model = make("llama_like")
    options = parse({"memory_budget": "20KiB"})
    fn = torch.compile(model, backend=simulated_backend(2, options, made), dynamic=True)
    for length in (12, 29, 3):
        tokens = tokens_of(length)
        fn(tokens, tokens).backward()
        assert len(made) == 1
    decided = [(k.name, k.kept) for k in made[0].rewritten.keepings]
    assert {kept for _, kept in decided} == {True, False}
    tokens = tokens_of(12)
    options = {"memory_budget": "20KiB"}
    plan = tspc.plan(model, (tokens, tokens), ranks=2, options=options)
    assert decided == [(k.name, k.kept) for k in plan.rewritten.keepings]


def test_the_plan_tells_what_is_kept() -> None:
    tokens = tokens_of(LENGTH)
    text = str(
        tspc.plan(LlamaLike(), (tokens, tokens), ranks=2, options={"memory_budget": 0.5})
    ).splitlines()
    (one,) = (l for l in text if l.startswith("kept for backward: "))
    (other,) = (l for l in text if l.startswith("recomputed in backward: "))
    names = {"blocks.0.attention", "blocks.0.mlp", "blocks.1.attention", "blocks.1.mlp", "head"}
    both = [{n for n in names if f"{n} " in l} for l in (one, other)]
    assert both[0] | both[1] == names and not both[0] & both[1]


@pytest.mark.parametrize(
    "value", [-0.1, 1.5, -1, True, 1, "2", "2 cows", "half", None, float("nan"), "1iB"]
)
def test_a_bad_value(value: Any) -> None:
    with pytest.raises(
        tspc.OptionError, match="memory_budget=.*valid: 'max-speed', 'min', a share"
    ):
        parse({"memory_budget": value})


def test_sizes_of_one_body() -> None:
    body = unit_of(mlp_program(), "pieces").bodies["m"]
    assert budget.kept_bytes(body, {}) > 0 and budget.spared(body, {}) > 0
    assert budget.kept_bytes(recomputing(body), {}) == 0 == budget.spared(recomputing(body), {})
