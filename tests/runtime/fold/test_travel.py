"""Shards on their way to the tokens, gradients on the way back, in lockstep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.tiny import Mlp, proved
from tspc.ir.body import Body
from tspc.runtime.comm.drivers import lockstep
from tspc.runtime.comm.requests import Axis, Steps
from tspc.runtime.fold.pieces import EagerPieces
from tspc.runtime.fold.step import Call, Values
from tspc.runtime.fold.travel import Gradients, Weights

RANKS = 3
SCHEDULES = ("ring", "broadcast", "gather")


@pytest.fixture(scope="module")
def body() -> Body:
    (graph,) = proved(Mlp(), RANKS)
    (of_mlp,) = graph.rewritten.bodies.values()
    return of_mlp


def calls(body: Body, schedule: str) -> list[Call]:
    out = []
    for r in range(RANKS):
        shards = [
            torch.full([int(n) for n in body.values[s].shape], 10.0 * r + i, dtype=torch.float64)
            for i, s in enumerate(body.shards)
        ]
        axis = Axis("t", RANKS, r)
        out.append(Call(axis, body, EagerPieces(body), schedule, [], [], shards, [], [], []))
    return out


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_rank_sees_each_shard_once(body: Body, schedule: str) -> None:
    def steps(call: Call) -> Steps[list[tuple[int, Values]]]:
        source, out = Weights(call), []
        for turn in range(RANKS):
            out.append((yield from source.next()))
            assert call.turn == turn + 1
        return out

    for r, seen in enumerate(lockstep([steps(c) for c in calls(body, schedule)])):
        order = [(r - t) % RANKS for t in range(RANKS)] if schedule == "ring" else [0, 1, 2]
        assert [j for j, _ in seen] == order
        for j, shards in seen:
            assert list(shards) == list(body.shards)
            for i, x in enumerate(shards.values()):
                assert (x == 10 * j + i).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_add_up_at_their_owner(body: Body, schedule: str) -> None:
    """Rank r's gradient of shard j is 100 r + j; one has none of the first weight."""

    def steps(call: Call) -> Steps[Values]:
        rank, sink = call.axis.rank, Gradients(call)
        shards = dict(zip(body.shards, call.shards))
        order = [(rank - t) % RANKS for t in range(RANKS)] if schedule == "ring" else [0, 1, 2]
        for j in order:
            grads = {n: torch.full_like(s, 100.0 * rank + j) for n, s in shards.items()}
            if rank == 0:
                del grads[body.shards[0]]
            yield from sink.put(j, grads)
        return (yield from sink.done())

    for r, grads in enumerate(lockstep([steps(c) for c in calls(body, schedule)])):
        assert list(grads) == list(body.shards)
        for i, (n, g) in enumerate(grads.items()):
            ranks = range(1 if i == 0 else 0, RANKS)
            assert g.shape == tuple(body.values[n].shape)
            assert (g == sum(100 * s + r for s in ranks)).all()


def test_frozen_weights_send_nothing(body: Body) -> None:
    frozen = {
        n: replace(t, requires_grad=False) if n in body.shards else t
        for n, t in body.values.items()
    }
    (call,) = calls(replace(body, values=frozen), "ring")[:1]

    def steps() -> Steps[Values]:
        sink = Gradients(call)
        yield from sink.put(0, {})
        return (yield from sink.done())

    assert lockstep([steps()]) == [{}]
