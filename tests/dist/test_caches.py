"""A second start lowers nothing, whichever rank filled the caches; what it computes is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.support.models import make, tokens_of
from tests.support.world import World

pytestmark = [pytest.mark.dist, pytest.mark.wide]


def start() -> tuple[dict[str, int], dict[str, int], float]:
    """The counters of both caches after a step, and its loss."""
    counters.clear()
    m = make("llama_like", layers=1).float()
    fn = torch.compile(m, backend="tsp", options={"schedule": "ring"})
    loss = fn(tokens_of(40), tokens_of(40))
    loss.backward()
    return dict(counters["inductor"]), dict(counters["aot_autograd"]), loss.item()


def test_one_ranks_caches_serve_all_ranks_of_the_next_start(tmp_path: Path) -> None:
    first = World(2, cache=str(tmp_path / "{rank}"))
    before = first.run(start)
    first.close()
    libraries = sorted((tmp_path / "0").glob("*/*.so"))
    for file in (libraries[0], libraries[-1]):  # as a compile that was killed leaves them
        file.write_bytes(b"")
    again = World(2, cache=str(tmp_path / "0"))
    after = again.run(start)
    again.close()
    for pieces, graphs, _ in before:
        assert pieces["fxgraph_cache_miss"] >= 8 and graphs["autograd_cache_miss"] == 1
    for pieces, graphs, loss in after:
        assert pieces["fxgraph_cache_hit"] >= 6 and not pieces.get("fxgraph_cache_miss")
        assert graphs["autograd_cache_hit"] == 1 and not graphs.get("autograd_cache_miss")
        assert not graphs.get("autograd_cache_bypass") and loss == before[0][2]
