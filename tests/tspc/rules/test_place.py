"""Rules of ops that sort, and of those that read or write places, each applied to a sample,
spelled, and tried by brute force."""

from __future__ import annotations

import pytest
import torch

from tests.support.rules import applied
from tests.support.samples import Sample, ids, of, x
from tspc.rules import place  # noqa: F401  declares the rules

aten = torch.ops.aten

A = x(3, 10, 7)
SRC = x(3, 4, 7)


def put(values: torch.Tensor, *indices: torch.Tensor) -> Sample:
    def fn(a: torch.Tensor, v: torch.Tensor, *i: torch.Tensor) -> torch.Tensor:
        return aten.index_put.default(a, list(i), v)

    return fn, (A, values, *indices)


def put_into_new(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """What is written into follows what is written."""
    return aten.index_put.default(torch.zeros(3, 10, 7, dtype=values.dtype), [index], values)


def added_into_new(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return aten.index_add.default(torch.zeros(3, 10, 7, dtype=source.dtype), 1, index, source)


CASES = [
    (of(aten.topk.default, A, 2, 1), "a b c -> a d c, a d c, whole=b d", 2),
    (of(aten.index_select.default, A, 1, ids(10, 4)), "a b c, d -> a d c, select=b", 3),
    (of(aten.scatter.value, A, 1, ids(10, 3, 4, 7), 2.0), "a b c, a d c -> a b c, whole=b d", 2),
    (
        of(aten.scatter_add.default, A, 1, ids(10, 3, 4, 7), SRC),
        "a b c, a d c, a e c -> a b c, whole=b d e",
        2,
    ),
    (
        of(aten.scatter.src, A, 1, ids(10, 2, 4, 5), SRC),
        "a b c, d e f, g h i -> a b c, whole=a b c d e f g h i",
        0,
    ),
    (
        of(aten.index_add.default, A, 1, ids(10, 4), SRC),
        "a b c, d, a e c -> a b c, whole=b d e",
        2,
    ),
    ((added_into_new, (SRC, ids(10, 4))), "a b c, d, a e c -> a b c, whole=b d e", 2),
    (put(x(2, 10, 7), ids(3, 2)), "a b c, d, e b c -> a b c, whole=a d e", 2),
    (put(x(4, 7), ids(3, 4), ids(10, 4)), "a b c, d, e, f c -> a b c, whole=a b d e f", 1),
    (put(x(7), ids(3, 2)), "a b c, d, e -> f g h, whole=a b c d e f g h", 0),
    ((put_into_new, (x(2, 10, 7), ids(3, 2))), "a b c, d, e b c -> a b c, whole=a d e", 2),
    (
        (lambda p: aten.one_hot.default(aten.argmax.default(p, 2), 7), (x(3, 5, 7),)),
        "a b -> a b c, whole=c",
        4,
    ),
]


@pytest.mark.parametrize("sample,text,cuts", CASES, ids=[c[1] for c in CASES])
def test_factors_of_a_look_up(sample: Sample, text: str, cuts: int) -> None:
    fn, tensors = sample
    assert applied(fn, *tensors) == (text, cuts)
