"""Views of stored tensors: what cuts a cut dim is gathered where it is read and written through;
of others dims move."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from tests.support.group import alone, cut
from tspc.base.errors import ShardedParameterError
from tspc.runtime.params.values import store_on
from tspc.runtime.params.views import Part, parts_of, places

X = torch.arange(12.0).view(4, 3)


@pytest.fixture
def stored() -> Iterator[DTensor]:
    with alone() as m:
        store_on(m)
        yield cut(X.clone(), m)


def test_a_row_is_read_as_it_is_now(stored: DTensor) -> None:
    row = stored[1]
    assert isinstance(row, Part) and row.tolist() == [3, 4, 5]
    stored.mul_(2)
    assert row.tolist() == [6, 8, 10] and row.numpy().sum() == 24 and "6." in repr(row)
    assert torch.equal(row + 1, X[1] * 2 + 1)


def test_what_is_written_goes_to_what_is_stored(stored: DTensor) -> None:
    part = stored[1:3]
    assert part.add_(1) is part
    assert torch.equal(stored.to_local()[1:3], X[1:3] + 1)
    inner = part[0]
    assert isinstance(inner, Part)
    inner.zero_()
    assert stored.to_local()[1].tolist() == [0, 0, 0] and stored.to_local()[2, 0] == 7


def test_several_views_at_once(stored: DTensor) -> None:
    first, second = stored.chunk(2)
    assert isinstance(first, Part) and torch.equal(first + 0, X[:2])
    second.fill_(5)
    assert (stored.to_local()[2:] == 5).all()
    made = parts_of(stored, X, (X[0], X[1]))
    assert isinstance(made, tuple) and isinstance(made[0], Part) and made[1].base is stored


def test_copies_are_plain(stored: DTensor) -> None:
    row = stored[1]
    for c in (copy.deepcopy(row), pickle.loads(pickle.dumps(row))):
        assert type(c) is torch.Tensor and torch.equal(c, X[1])


def test_a_write_that_a_gradient_would_miss(stored: DTensor) -> None:
    p = nn.Parameter(stored)
    with pytest.raises(ShardedParameterError, match="writes into a part of a sharded tensor"):
        (p * 2)[0].add_(1)
    with torch.no_grad():
        p[0].add_(1)
    assert p.to_local()[0].tolist() == [1, 2, 3]


CASES: list[tuple[str, dict[str, Any], dict[int, int]]] = [
    ("t", {}, {0: 1, 1: 0}),
    ("transpose", {"dim0": -1, "dim1": 0}, {0: 1, 1: 0}),
    ("permute", {"dims": [1, 0]}, {1: 0, 0: 1}),
    ("view", {"size": [4, 3]}, {0: 0, 1: 1}),
    ("view", {"size": [12]}, {}),
    ("expand", {"size": [2, 4, 3]}, {0: 1, 1: 2}),
    ("expand", {"size": [4, 4, 3, 3]}, {}),
    ("unsqueeze", {"dim": 0}, {0: 1, 1: 2}),
    ("unsqueeze", {"dim": -1}, {0: 0, 1: 1}),
    ("select", {"dim": 0}, {1: 0}),
    ("slice", {"dim": 0, "start": 1}, {1: 1}),
    ("slice", {"dim": 0, "end": 99}, {0: 0, 1: 1}),
]


@pytest.mark.parametrize("name,named,to", CASES)
def test_where_dims_are_in_a_view(name: str, named: dict, to: dict, stored: DTensor) -> None:
    assert places(name, stored, named) == to
