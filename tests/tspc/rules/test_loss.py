"""Rules of losses: the label's logit is in one shard of the classes, zero in the others."""

from __future__ import annotations

import pytest
import torch

from tests.support.rules import applied
from tests.support.samples import Sample, ids, x
from tspc.rules import loss  # noqa: F401  declares the rules

tspc = torch.ops.tspc


def checked(p: torch.Tensor) -> torch.Tensor:
    return tspc.in_range.default(torch.ops.aten.argmax.default(p, 2), 7, "here")


CASES = [
    (
        (lambda p, i: tspc.pick.default(p, i), (x(3, 5, 7), ids(7, 3, 5))),
        "a b c, a b,  -> a b, reduce=c",
        3,
    ),
    ((checked, (x(3, 5, 7),)), "a b -> a b", 4),
]


@pytest.mark.parametrize("sample,text,cuts", CASES, ids=[c[1] for c in CASES])
def test_factors_of_a_loss(sample: Sample, text: str, cuts: int) -> None:
    fn, tensors = sample
    assert applied(fn, *tensors) == (text, cuts)
