"""What is not finite is named, with the ranks and whether the inputs were already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.support.group import alone
from tspc.base.errors import NonFiniteError
from tspc.base.options import parse
from tspc.runtime.call.finite import check_gradients, check_outputs
from tspc.runtime.comm.place import Place
from tspc.runtime.comm.requests import Axis
from tspc.runtime.mesh import resolve

NAN, INF = float("nan"), float("inf")
GOOD = torch.ones(2)


@pytest.fixture
def place() -> Iterator[Place]:
    with alone():
        yield resolve(parse(None), torch.device("cpu"))[0]


def test_finite_values_pass_and_others_are_passed_over(place: Place) -> None:
    masked, none = torch.tensor([1.0, -INF]), torch.ones(0)
    outputs = [("a", masked), ("b", 3), ("c", torch.ones(2).long()), ("d", none)]
    check_outputs(place, outputs, [])
    check_gradients(place, [("w", GOOD), ("v", None)], [])
    check_gradients(place, [], [])


def test_an_output_and_what_it_was_given(place: Place) -> None:
    bad = torch.tensor([1.0, NAN])
    with pytest.raises(NonFiniteError) as caught:
        check_outputs(place, [("output 0", bad), ("output 1", torch.tensor(INF))], [("w", GOOD)])
    text = "output 0 is not finite on ranks [0] (so are 1 more: output 1) after the forward; all "
    assert str(caught.value).startswith(text)
    with pytest.raises(NonFiniteError, match=r"already what the call was given .*: w is not"):
        check_outputs(place, [("output 0", bad)], [("x", GOOD), ("w", masked_by_infinity())])


def masked_by_infinity() -> torch.Tensor:
    return torch.tensor([1.0, INF])


def test_gradients_over_replicas(place: Place) -> None:
    groups = {**place.groups, "replica checks": dist.group.WORLD}
    both = replace(place, replicas=Axis("replicas", 1, 0), groups=groups)
    with pytest.raises(NonFiniteError, match="^the gradient of w is not finite on ranks"):
        check_gradients(both, [("v", GOOD), ("w", masked_by_infinity())], [])
