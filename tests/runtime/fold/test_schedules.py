"""Folds under each schedule, forward and backward, are one device's; which one a call takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch.nn as nn

from tests.support.tiny import Attention, Cached, Head, Mlp, proved
from tspc.cost.model import BROADCAST, RING, STATIONARY
from tspc.runtime.comm.drivers import record
from tspc.runtime.fold.schedules import choose

SCHEDULES = ("ring", "broadcast", "gather", "stationary")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "heads": Attention,
    "one key head": lambda: Attention(3, 1),
    "fewer units than ranks": lambda: Mlp(2),
    "logits": Head,
    "stacked": Cached,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_one_device(name: str, schedule: str) -> None:
    options = {"outputs": "full"} if name == "stacked" else {}
    (graph,) = proved(MODELS[name](), schedule=schedule, **options)
    assert len(graph.rewritten.folds) == 1


@pytest.mark.parametrize(
    "schedule,kinds",
    [
        ("ring", {"Shift"}),
        ("broadcast", {"Broadcast", "Reduce"}),
        ("gather", {"AllGather", "ReduceScatter"}),
    ],
)
def test_weights_travel_as_the_schedule_says(schedule: str, kinds: set[str]) -> None:
    with record() as sent:
        proved(Mlp(), schedule=schedule)
    assert {s.kind for s in sent if s.link == "weights"} - {"AllReduce", "AllToAll"} == kinds


def test_a_call_takes_what_is_asked_for_or_the_fastest() -> None:
    bodies = {}
    for model in (Mlp(), Attention()):
        (graph,) = proved(model, 2)
        (bodies[type(model)],) = graph.rewritten.bodies.values()
    mlp, attention = bodies[Mlp], bodies[Attention]
    assert choose(replace(mlp, schedule="gather"), 2, (), (4,)) == "gather"
    assert choose(replace(attention, schedule=RING), 2, (), (4,)) == BROADCAST
    sizes = [7] * len(mlp.symbols)
    assert choose(mlp, 2, sizes, (4,)) in (RING, STATIONARY)
