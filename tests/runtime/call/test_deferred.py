"""A deferred output: the whole shape, gathered once at first use, without a gradient."""

from __future__ import annotations

import pytest
import torch

from tspc.base.errors import RankFailureError, UnsupportedError
from tspc.runtime.call import deferred
from tspc.runtime.call.deferred import DeferredTensor, defer

VALUE = torch.arange(6.0).view(2, 3)


def test_it_is_gathered_at_first_use_and_once() -> None:
    calls: list[int] = []

    def gather() -> torch.Tensor:
        calls.append(1)
        return VALUE

    x = DeferredTensor(gather, (2, 3), torch.float32, VALUE.device)
    assert (x.shape, x.dtype) == ((2, 3), torch.float32) and "DeferredTensor" in repr(x)
    y = x.detach()
    assert not calls and isinstance(y, DeferredTensor)
    assert torch.equal(x + 1, VALUE + 1) and torch.equal(y * 2, VALUE * 2) and len(calls) == 1
    assert x.whole() is VALUE and torch.stack([x, x]).shape == (2, 2, 3)


def test_it_has_no_gradient() -> None:
    x = defer(lambda: VALUE, (2, 3), torch.float32, VALUE.device)
    assert x.requires_grad
    with pytest.raises(UnsupportedError, match="beside its loss was differentiated"):
        x.sum().backward()
    with torch.no_grad():
        assert not defer(lambda: VALUE, (2, 3), torch.float32, VALUE.device).requires_grad
    assert not defer(lambda: VALUE.long(), (2, 3), torch.int64, VALUE.device).requires_grad


def test_a_rank_that_does_not_read_it_is_told_with_the_place() -> None:
    def gather() -> torch.Tensor:
        raise RankFailureError("rank 1 is missing")

    x = DeferredTensor(gather, (2, 3), torch.float32, VALUE.device)
    with pytest.raises(
        RankFailureError, match=r"^test_deferred.py:\d+ reads an output .*float32\[2"
    ):
        x + 1
    assert deferred._reader().startswith("test_deferred.py:")
