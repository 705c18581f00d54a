"""What a rank has done with its parameters: steps, changes in place, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from tests.support.group import alone, cut
from tspc.runtime.call import drift


def test_changes_in_place_since_a_graph_took_them() -> None:
    taken, p, q = drift.Taken(), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert taken.since([p, q]) == [0, 0, 0]
    with torch.no_grad():
        q.add_(1)
        q.mul_(2)
    assert taken.since([p, q]) == [0, 0, 2]
    other = drift.Taken()
    assert other.since([q]) == [0, 2] and taken.since([]) == [0]


def test_steps_of_optimizers_that_hold_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    drift.watch()
    drift.watch()
    assert len(drift._HOOKS) == 1
    with alone() as mesh:
        p = nn.Parameter(cut(torch.ones(2), mesh))
        plain = nn.Parameter(torch.ones(2))
        taken = drift.Taken()
        taken.since([p])
        for x in (p, plain, p):
            x.grad = torch.ones_like(x)
            torch.optim.SGD([x], 0.1).step()
        assert taken.since([p])[0] == 2 and drift.steps_since([p]) == "2"
        assert drift.steps_since([plain]) == drift.steps_since([]) == "unknown"
    calls = [drift._STEPS[0]]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    drift._count(torch.optim.SGD([p], 0.1), (), {})
    assert calls == drift._STEPS


def test_gradients_and_how_often_they_were_changed() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    p.grad.mul_(2)
    assert drift.gradients([p, q]) == [1, -1]
