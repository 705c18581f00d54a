"""What a thread of torch's may be the last to hold is kept: the small ones, the last of them."""

from __future__ import annotations

import sys
from collections import deque

import pytest
import torch

from tspc.runtime.comm import ending


def test_small_tensors_are_held_the_last_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: deque[torch.Tensor] = deque(maxlen=2)
    monkeypatch.setattr(ending, "_LAST", kept)
    xs = [torch.ones(3) for _ in range(3)]
    ending.hold(xs[0], None, torch.ones(ending.SMALL), xs[1])
    ending.hold(xs[2])
    assert [x is y for x, y in zip(kept, xs[1:])] == [True, True]


def test_at_the_end_they_are_never_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    monkeypatch.setattr(ending, "_LAST", deque([x]))
    monkeypatch.setattr(ending, "PAUSE", 0.0)
    before = sys.getrefcount(x)
    ending._end()
    assert sys.getrefcount(x) == before + 1
