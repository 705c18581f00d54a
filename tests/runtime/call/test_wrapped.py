"""Models that another library shards or replicates are told before the first graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.support.group import alone, cut, stored
from tspc.base.errors import PlanError
from tspc.runtime.call.wrapped import check_wrapped


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_wrapped(self)
        return self.inner(x)


def test_a_plain_model_and_ours_pass() -> None:
    model = Outer(nn.Linear(2, 2))
    assert model(torch.ones(1, 2)).shape == (1, 2)
    with stored(model) as (m, _):
        check_wrapped(m)
        check_wrapped(len)


def test_wrappers_inside_and_around() -> None:
    with alone() as mesh:
        with pytest.raises(PlanError, match=r"DistributedDataParallel in Outer.inner do not go"):
            check_wrapped(Outer(DistributedDataParallel(nn.Linear(2, 2))))
        around = DistributedDataParallel(Outer(nn.Linear(2, 2)))
        with pytest.raises(PlanError, match="DistributedDataParallel around the compiled module"):
            around(torch.ones(1, 2))
        sharded = Outer(fully_shard(nn.Linear(2, 2), mesh=mesh))
        with pytest.raises(PlanError, match="fully_shard in Outer.inner"):
            check_wrapped(sharded)
        theirs = Outer(nn.Linear(2, 2))
        theirs.inner.weight = nn.Parameter(cut(torch.ones(2, 2), mesh))
        with pytest.raises(PlanError, match=r"a DTensor already \(weight in Outer.inner\)"):
            check_wrapped(theirs)
