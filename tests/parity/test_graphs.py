"""Random graphs, rewritten, equal the original: outputs and gradients (`--graphs 200`: more)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import tspc
from tests.support.graphs import ENDS, STEPS, Graph, Model, graphs

pytestmark = pytest.mark.slow
CHUNKS = 2


def check(g: Graph) -> None:
    """`check(Graph(...))` replays a failure."""
    torch.manual_seed(0)
    model = Model(g).double()
    tokens = torch.randint(0, 17, (g.batch, g.length))
    floats = torch.randn(g.batch, g.length, g.hidden, dtype=torch.float64, requires_grad=True)
    options = {"layout": g.layout, "schedule": g.schedule, "outputs": "full"}
    try:
        found = tspc.verify(model, (tokens, floats), {}, g.ranks, options, 1e-9)
    except Exception as e:
        raise AssertionError(f"{type(e).__name__} {str(e)[:500]}: {g}") from e
    assert found.errors["gradient of"] or found.errors["input gradient"], g


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_equals_the_original(chunk: int, request: pytest.FixtureRequest) -> None:
    @seed(chunk)
    @settings(
        max_examples=max(1, request.config.getoption("--graphs") // CHUNKS),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(graphs())
    def run(g: Graph) -> None:
        check(g)

    run()


@pytest.mark.wide
@pytest.mark.parametrize("end", sorted(ENDS))
@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_step(name: str, end: str) -> None:
    """Alone between two regions."""
    steps = (("mlp", 0), (name, 1), ("attention", 2))
    check(Graph(steps, end, 3, "auto", "auto", 2, 7, 2, 4, "causal", True))
