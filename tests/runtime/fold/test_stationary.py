"""The stationary schedule: tokens are gathered, outputs scattered, no weight travels."""

from __future__ import annotations

import pytest

from tests.support.tiny import Attention, Head, Mlp, proved
from tspc.runtime.comm.drivers import record
from tspc.runtime.fold import stationary


@pytest.mark.parametrize("ranks,length", [(2, 7), (3, 5), (4, 3)])
def test_equals_one_device(ranks: int, length: int) -> None:
    for model in (Mlp(), Attention(3, 1), Head()):
        with record() as sent:
            (graph,) = proved(model, ranks, length, schedule="stationary")
        assert len(graph.rewritten.folds) == 1
        assert not {"Shift", "Broadcast"} & {s.kind for s in sent}
        assert {"AllGather"} <= {s.kind for s in sent}


def test_ranks_without_a_unit_send_zeros() -> None:
    (graph,) = proved(Mlp(2), 4, schedule="stationary")
    (body,) = graph.rewritten.bodies.values()
    assert body.real_steps() == 2 < body.ranks
    assert stationary.stationary_forward.__doc__


def test_zigzag_rows_are_put_in_order() -> None:
    (graph,) = proved(Attention(), 3, 13, schedule="stationary", layout="zigzag")
    assert [e.order for e in graph.rewritten.choice.extents] == ["zigzag"]
