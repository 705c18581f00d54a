"""tspc's ops on ranks: what each generator does, its results contiguous and of their own."""

from __future__ import annotations

import torch

from tspc.runtime.comm.drivers import lockstep
from tspc.runtime.comm.requests import Axis
from tspc.runtime.execute import GENERATORS


def test_a_varied_value_is_contiguous() -> None:
    """As its fake says, also where the value is not."""
    x = torch.arange(12.0).view(3, 4).t()
    for (y,) in lockstep(
        [GENERATORS["vary"](Axis("tsp", 2, r), [x], None, "tsp") for r in range(2)]
    ):
        assert y.is_contiguous() and torch.equal(x, y)
