"""Rules of random ops: element by element, each index along its dim, the state whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.rules import applied
from tests.support.samples import Sample, ids, x
from tspc.factors.registry import COMPUTED
from tspc.rules.random import drawn, query_states

tspc = torch.ops.tspc


def sample(draw: Callable[..., torch.Tensor], dims: int = 3) -> Sample:
    a = x(3, 5, 7)
    return draw, (a, ids(2**32, 2), *(torch.arange(n) for n in a.shape[:dims]))


CASES = [
    (
        sample(lambda p, s, *i: tspc.dropout.default(p, s, i, 0.5)),
        "a b c, d, a, b, c -> a b c, whole=d",
        3,
    ),
    (
        sample(lambda p, s, *i: tspc.uniform.default(p, s, i, dtype=p.dtype)),
        "a b c, d, a, b, c -> a b c, whole=d",
        3,
    ),
    (
        sample(lambda p, s, *i: tspc.query_states.default(p, s, i), 2),
        "a b c, d, a, b -> a b, whole=c d",
        2,
    ),
]


@pytest.mark.parametrize("sample,text,cuts", CASES, ids=[c[1] for c in CASES])
def test_factors_of_a_draw(sample: Sample, text: str, cuts: int) -> None:
    fn, tensors = sample
    assert applied(fn, *tensors) == (text, cuts)


def test_draws_share_a_rule() -> None:
    assert COMPUTED[tspc.normal.default] is COMPUTED[tspc.dropout.default] is drawn
    assert COMPUTED[tspc.query_states.default] is query_states
