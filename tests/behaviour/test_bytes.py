"""Elements of payload per rank, averaged over ranks, equal the closed forms of docs/design.md,
"Cost model", for every schedule."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from examples.llama_like import LlamaLike
from tests.dist.test_order import Issued, issued
from tspc.backend.simulated import Simulated, simulated_backend
from tspc.base.options import parse
from tspc.runtime.comm.drivers import Sent, record

pytestmark = pytest.mark.sampled(2)

RANKS, BATCH, LENGTH, HIDDEN = 4, 3, 19, 64
F = (RANKS - 1) / RANKS


def model_of(kv_heads: int) -> tuple[LlamaLike, torch.Tensor]:
    torch.manual_seed(0)
    return LlamaLike(187, HIDDEN, 2, 8, kv_heads, 50), torch.randint(0, 187, (BATCH, LENGTH))


def step(schedule: str, kv_heads: int) -> tuple[Simulated, list[Sent], list[Sent]]:
    """One call that returns only the loss: (graph, sent forward, sent backward)."""
    model, tokens = model_of(kv_heads)
    made: list[Simulated] = []
    torch._dynamo.reset()
    fn = torch.compile(model, backend=simulated_backend(RANKS, parse({"schedule": schedule}), made))
    with record() as forward:
        loss = fn(tokens, tokens)
    with record() as backward:
        loss.backward()
    return made[0], forward, backward


def total(sent: list[Sent], link: str, *kinds: str) -> float:
    return sum(s.elements for s in sent if s.link == link and (not kinds or s.kind in kinds))


def sizes(graph: Simulated) -> tuple[int, int, int, int]:
    """(weights of folds without the head, of the head, K and V of all layers, B * padded S * h)."""
    bodies = list(graph.rewritten.bodies.values())
    head = [b for b in bodies if len(b.outs) > 1]
    weights = sum(b.weight_elements * RANKS for b in bodies if len(b.outs) == 1)
    rows = RANKS * graph.rewritten.choice.extents[0].rows(RANKS, graph.sizes)
    kv = 2 * 2 * BATCH * rows * 8 * (HIDDEN // 8)  # 2 layers, K and V, 8 K/V heads
    return weights, sum(b.weight_elements * RANKS for b in head), kv, BATCH * rows * HIDDEN


@pytest.mark.parametrize("schedule", ["ring", "broadcast", "gather"])
def test_folded_schedules(schedule: str) -> None:
    graph, forward, backward = step(schedule, 8)
    weights, head, kv, n = sizes(graph)
    folds = weights + head
    assert total(forward, "weights") == pytest.approx(F * folds)
    attention = total(forward, "activations", "AllGather")
    assert attention == pytest.approx(F * kv)
    assert total(forward, "activations", "Shift") == pytest.approx(RANKS * F * n / RANKS)
    if schedule == "ring":  # attention is broadcast: it has an exchange
        attended = sum(
            b.weight_elements * RANKS for b in graph.rewritten.bodies.values() if b.attentions
        )
        expected = F * folds + F * attended + (folds - attended)
    else:
        expected = 2 * F * folds
    assert total(backward, "weights") == pytest.approx(expected)
    assert total(backward, "activations", "AllGather", "ReduceScatter") == pytest.approx(2 * F * kv)


def test_one_kv_head_is_exchanged_once() -> None:
    graph, forward, backward = step("broadcast", 1)
    rows = RANKS * graph.rewritten.choice.extents[0].rows(RANKS, graph.sizes)
    kv = 2 * 2 * BATCH * rows * (HIDDEN // 8)
    assert total(forward, "activations", "AllGather") == pytest.approx(F * kv)
    again = total(backward, "activations", "AllGather", "ReduceScatter")
    assert again == pytest.approx(2 * F * kv)


def test_stationary() -> None:
    graph, forward, backward = step("stationary", 4)
    _, _, _, n = sizes(graph)
    regions = len(graph.rewritten.folds)
    assert not total(forward, "weights") and not total(backward, "weights")
    scalars = 2 * BATCH * n // (BATCH * HIDDEN)  # the head's log-sum-exp blocks and label logits
    sums = total(forward, "activations", "AllGather", "ReduceScatter")
    assert sums == pytest.approx(F * (n * (2 * regions - 1) + scalars / 2))
    back = total(backward, "activations", "AllGather", "ReduceScatter")
    assert back == pytest.approx(F * (n * (3 * regions - 1) + scalars / 2))


def test_a_recorder_sees_kinds() -> None:
    _, forward, _ = step("broadcast", 8)
    kinds = Counter(s.kind for s in forward)
    assert kinds["Broadcast"] == 5 * RANKS and kinds["AllReduce"] == 1


def counted(sent: list[Issued]) -> dict[str, float]:
    """Elements by link of what a process group was asked to do, averaged over ranks, without
    `repack`."""
    factors = {"send": 1, "broadcast": F, "reduce": F, "allreduce": 2 * F}
    out: Counter[str] = Counter()
    for kind, link, shape, _ in sent:
        if kind in factors or link != "weights":
            out[link] += factors.get(kind, F) * math.prod(shape)  # all-to-all: F too
    return {link: out[link] for link in ("weights", "activations")}


def issue(schedule: str, kv_heads: int) -> tuple[dict[str, float], dict[str, float]]:
    """What this rank issues to its process groups in a call and its backward."""
    model, tokens = model_of(kv_heads)
    fn = torch.compile(model, backend="tsp", options={"schedule": schedule, "compiler": "eager"})
    fn(tokens, tokens).backward()
    with issued() as forward:
        loss = fn(tokens, tokens)
    with issued() as backward:
        loss.backward()
    return counted(forward), counted(backward)


@pytest.mark.dist
@pytest.mark.parametrize(
    "schedule",
    ["ring", "broadcast", pytest.param("gather", marks=pytest.mark.wide), "stationary"],
)
def test_process_groups_are_given_as_much(world: Any, schedule: str) -> None:
    """What the tests above count is what the process groups are asked to send."""
    _, *parts = step(schedule, 8)
    expected = [{link: total(part, link) for link in ("weights", "activations")} for part in parts]
    ranks = world(RANKS).run(issue, schedule=schedule, kv_heads=8)
    for i, wanted in enumerate(expected):
        for link, elements in wanted.items():
            mean = sum(r[i][link] for r in ranks) / RANKS
            assert mean == pytest.approx(elements), (i, link)
