"""Rules of ops that work element by element, each applied to a sample, spelled, and tried by brute
force."""

from __future__ import annotations

import pytest
import torch

from tests.support.rules import applied
from tests.support.samples import Sample, of, x
from tspc.factors.notation import pointwise
from tspc.factors.registry import COMPUTED
from tspc.rules.pointwise import same

aten = torch.ops.aten

A = x(3, 5, 7)
CASES = [
    (of(aten.to.dtype, A, torch.float32), "a b c -> a b c", 3),
    (of(aten.contiguous.default, A), "a b c -> a b c", 3),
    (of(aten.dropout.default, A, 0.5, False), "a b c -> a b c", 3),
    (of(aten.type_as.default, A, x(7)), "a b c, c -> a b c", 3),
    (of(aten.copy.default, A, x(7)), "a b c, c -> a b c", 3),
    (of(aten.log_sigmoid.default, A), "a b c -> a b c", 3),
    (of(aten.zeros_like.default, A), "a b c -> a b c", 3),
    (of(aten.full_like.default, A, 2.0), "a b c -> a b c", 3),
]


@pytest.mark.parametrize("sample,text,cuts", CASES, ids=[c[1] for c in CASES])
def test_factors_go_through(sample: Sample, text: str, cuts: int) -> None:
    fn, tensors = sample
    assert applied(fn, *tensors) == (text, cuts)


@pytest.mark.parametrize("op", [aten.to.dtype, aten.contiguous.default, aten.dropout.default])
def test_ops_that_torch_does_not_tag(op: torch._ops.OpOverload) -> None:
    assert COMPUTED[op] is pointwise and torch.Tag.pointwise not in op.tags


def test_what_is_like_another_has_its_dims() -> None:
    assert COMPUTED[aten.empty_like.default] is COMPUTED[aten.ones_like.default] is same
