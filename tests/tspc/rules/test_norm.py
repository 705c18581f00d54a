"""Rules of reductions, norms and what needs a dim whole, each applied to a sample, spelled, and
tried by brute force."""

from __future__ import annotations

import pytest
import torch

from tests.support.rules import applied
from tests.support.samples import Sample, of, x
from tspc.rules.norm import letters

aten = torch.ops.aten

A = x(3, 5, 7)
CASES = [
    (of(aten.rms_norm.default, A, [7], x(7)), "a b c, c -> a b c, whole=c", 2),
    (of(aten.rms_norm.default, A, [5, 7]), "a b c,  -> a b c, whole=b c", 1),
    (of(aten.layer_norm.default, A, [7], x(7), x(7)), "a b c, c, c -> a b c, whole=c", 2),
    (of(aten.sum.default, A), "a b c -> , reduce=a b c", 3),
    (of(aten.sum.dim_IntList, A, []), "a b c -> , reduce=a b c", 3),
    (of(aten.mean.dim, A, [-2], True), "a b c -> a 1 c, reduce=b", 3),
    (of(aten.sum.dim_IntList, A, [0, -1]), "a b c -> b, reduce=a c", 3),
    (of(aten.softmax.int, A, -1), "a b c -> a b c, whole=c", 2),
    (of(aten.sort.default, A, 1), "a b c -> a b c, a b c, whole=b", 2),
    (of(aten.cumsum.default, A, 1), "a b c -> a b c, scan=b", 2),
    (of(aten.flip.default, A, [1, 2]), "a b c -> a b c, halo=b c", 1),
    (of(aten.roll.default, A, [1], [1]), "a b c -> a b c, halo=b", 2),
    (of(aten.roll.default, A, [1], []), "a b c -> a b c, whole=a b c", 0),
    (of(aten.max.dim, A, 1), "a b c -> a c, a c, whole=b", 2),
    (of(aten.argmax.default, A), "a b c -> , whole=a b c", 0),
    (of(aten.var.dim, A, [0, 2], False, True), "a b c -> 1 b 1, whole=a c", 1),
    (of(aten.logsumexp.default, A, [0, -1]), "a b c -> b, lse=a c", 3),
    (of(aten.tril.default, x(3, 5, 5)), "a b c -> a b c, whole=b c", 1),
    (of(aten.triu.default, A, 1), "a b c -> a b c, whole=b c", 1),
]


@pytest.mark.parametrize("sample,text,cuts", CASES, ids=[c[1] for c in CASES])
def test_factors_of_a_reduction(sample: Sample, text: str, cuts: int) -> None:
    fn, tensors = sample
    assert applied(fn, *tensors) == (text, cuts)


def test_letters_are_of_their_own() -> None:
    assert letters(3) == ["a0", "a1", "a2"]
