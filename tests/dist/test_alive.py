"""What a rank saves for the backward and what is alive while it runs, over gloo
(docs/design.md, "Invariants")."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

from examples.llama_like import LlamaLike
from tspc.backend.tsp import GRAPHS
from tspc.runtime.comm import drivers, ending

pytestmark = pytest.mark.dist
RANKS, BATCH, LENGTH, HIDDEN, HEADS, KV_HEADS, FFN, WORDS = 4, 2, 262, 64, 8, 4, 208, 136


PATIENCE = 2.0  # seconds


class Flying:
    """Weight shards, and their gradients, that are alive when one more is sent.

    A thread of gloo's lets go of a tensor only some time after the wait for it has ended: beyond
    two, those that vanish by themselves within `PATIENCE` are not counted. Of small ones a process
    keeps the last for its end, 4 MiB at most (`runtime/comm/ending.py`): here none is small.
    """

    def __init__(self) -> None:
        self.issue, self.seen, self.small = drivers._issue, {}, ending.SMALL
        self.most: dict[tuple[int, int], int] = {}

    def __enter__(self) -> Flying:
        drivers._issue, ending.SMALL = self.watched, 0
        ending._LAST.clear()
        return self

    def __exit__(self, *_: object) -> None:
        drivers._issue, ending.SMALL = self.issue, self.small

    def watched(self, request: Any, axis: Any, group: Any) -> Any:
        handle = self.issue(request, axis, group)
        if request.link == "weights":
            key = request.tensor.numel(), request.tensor.element_size()
            storages = self.seen.setdefault(key, {})
            for t in (request.tensor, handle.result):
                if t is not None:
                    storages[t.data_ptr()] = StorageWeakRef(t.untyped_storage())
            alive, deadline = self.alive(storages), time.monotonic() + PATIENCE
            while alive > 2 and time.monotonic() < deadline:
                time.sleep(0.01)
                alive = self.alive(storages)
            self.most[key] = max(self.most.get(key, 0), alive)
        return handle

    @staticmethod
    def alive(storages: dict[int, StorageWeakRef]) -> int:
        return sum(not s.expired() for s in storages.values())


def largest(step: Callable[[], Any]) -> int:
    """Bytes of the largest allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        step()
    return max(e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]")


def watch(schedule: str, budget: str) -> dict[str, Any]:
    """The third step of a model: its allocations, what it saves, the sizes of its shards.

    bfloat16: a shard on its way has two bytes an element, its gradient four.
    """
    torch.manual_seed(0)
    model = LlamaLike(WORDS, HIDDEN, 1, HEADS, KV_HEADS, FFN).bfloat16()
    options = {"schedule": schedule, "memory_budget": budget, "compiler": "eager"}
    fn = torch.compile(model, backend="tsp", options=options)
    tokens = torch.randint(0, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        fn(tokens, tokens).backward()
    saved: list[tuple[tuple[int, ...], bool]] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append((tuple(x.shape), x.is_floating_point()))
        return x

    kept: list[torch.Tensor] = []

    def forward() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            kept.append(fn(tokens, tokens))

    with Flying() as flying:
        largest_of = largest(forward), largest(lambda: kept.pop().backward())
    (graph,) = GRAPHS[model]
    bodies = graph.rewritten.bodies
    return {
        "largest": max(largest_of),
        "flying": flying.most,
        "saved": saved,
        "shards": {n: b.weight_elements for n, b in bodies.items()},
        "weights": [tuple(p.shape) for p in model.parameters()],
    }


@pytest.mark.parametrize(
    "schedule, budget",
    [
        ("ring", "min"),
        ("broadcast", "min"),
        ("broadcast", "max-speed"),
        ("gather", "max-speed"),
        ("stationary", "max-speed"),
    ],
)
@pytest.mark.sampled(2)
def test_what_is_saved_and_alive(world: Any, schedule: str, budget: str) -> None:
    """Two shards of a region at a time and as many gradients, no whole activation, nothing gathered
    among what is saved."""
    padded = -(-LENGTH // (2 * RANKS)) * 2 * RANKS
    for seen in world(RANKS).run(watch, schedule=schedule, budget=budget):
        shards = set(seen["shards"].values())
        assert len(shards) == 3
        if budget == "min":
            assert 0 < seen["largest"] < 2 * BATCH * LENGTH * HIDDEN
            for elements in shards:
                assert seen["flying"][elements, 2] == 2
                assert 1 <= seen["flying"][elements, 4] <= 2
        assert seen["saved"]
        for shape, floating in seen["saved"]:
            if floating and shape != (LENGTH, HIDDEN // HEADS):  # the rotary tables are whole
                assert not {LENGTH, padded} & set(shape), shape
            assert shape not in seen["weights"] or len(shape) == 1, shape
            assert torch.Size(shape).numel() not in {n * RANKS for n in shards}, shape
