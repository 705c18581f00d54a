"""Masks as predicates in real gloo processes through Inductor: gradients equal one device's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parity import test_predicates as kinds
from tests.support.models import whole
from tspc.backend.simulated import relative_errors

pytestmark = pytest.mark.dist


def gradients(mask: str) -> float:
    """Worst relative error over calls of two lengths."""
    ends = []
    for tsp in (False, True):
        torch.manual_seed(0)
        model = kinds.Model(getattr(kinds, mask), layers=1)
        fn = torch.compile(model, backend="tsp", dynamic=True) if tsp else model
        for length in (12, 15):
            fn(*kinds.inputs(length)).square().mean().backward()
        ends.append({n: whole(p.grad) for n, p in model.named_parameters()})
    return max(relative_errors(ends[1], ends[0]).values())


@pytest.mark.parametrize("mask", ["window", "following"])
@pytest.mark.sampled(2)
def test_inductor_equals_one_device(world: Any, mask: str) -> None:
    assert max(world(2).run(gradients, mask=mask)) <= 1e-5
