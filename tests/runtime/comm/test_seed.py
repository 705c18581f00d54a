"""The seed of a call: of torch's generator, the first rank's for all."""

from __future__ import annotations

import torch

from tspc.runtime.comm import seed
from tspc.runtime.comm.drivers import lockstep
from tspc.runtime.comm.place import Place
from tspc.runtime.comm.requests import Axis


def test_it_repeats_with_torchs_seed() -> None:
    torch.manual_seed(3)
    first, second = int(seed.draw()), int(seed.draw())
    torch.manual_seed(3)
    assert int(seed.draw()) == first != second and 0 <= first < 2**63


def test_all_take_the_first_ranks() -> None:
    got = lockstep([seed._first(torch.tensor(r + 5)) for r in range(3)])
    assert [x.item() for x in got] == [5, 5, 5] and got[0].shape == ()


def test_alone_it_is_its_own() -> None:
    torch.manual_seed(3)
    drawn = seed.draw()
    torch.manual_seed(3)
    assert seed.shared(Place(Axis("t", 1, 0)), torch.device("cpu")) == drawn
