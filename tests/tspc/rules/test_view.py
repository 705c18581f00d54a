"""Rules of ops that move elements, each applied to a sample, spelled, and tried by brute force."""

from __future__ import annotations

import pytest
import torch

from tests.support.rules import applied
from tests.support.samples import Sample, ids, of, x
from tspc.rules.view import bounds

aten = torch.ops.aten

A, B = x(3, 10, 7), x(3, 10, 7)
LAST = 9223372036854775807


def joined(dim: int, *tensors: torch.Tensor, op: torch._ops.OpOverload) -> Sample:
    return (lambda *t: op(list(t), dim)), tensors


def tiled(p: torch.Tensor) -> torch.Tensor:
    """Slices that together tile a dim refine it."""
    first = aten.slice.Tensor(p, 1, 0, 4)
    return aten.cat.default([aten.slice.Tensor(p, 1, 4), first], 1)


def halves_again(p: torch.Tensor) -> torch.Tensor:
    """A bound on segments that an op before has made."""
    return aten.slice.Tensor(aten.cat.default([p, p, p], 1), 1, 10, 30)


def padded_range(p: torch.Tensor) -> torch.Tensor:
    return aten.cat.default([aten.slice.Tensor(p, 1, 1, 4), p], 1)


CASES = [
    (of(aten.t.default, x(3, 5)), "a b -> b a", 2),
    (of(aten.numpy_T.default, x(3, 5)), "a b -> b a", 2),
    (of(aten.view_as_complex.default, x(3, 5, 2)), "a b c -> a b, whole=c", 2),
    (of(aten.view.default, A, [3, 2, 5, 7]), "a (b c) d -> a b c d", 4),
    (of(aten.view.default, x(3, 10), [6, 5]), "a (b c) -> (a b) c", 3),
    (of(aten.reshape.default, A, [3, 5, -1]), "a (b c) d -> a b (c d)", 4),
    (of(aten.unsqueeze.default, A, 1), "a b c -> a 1 b c", 3),
    (of(aten.squeeze.dim, x(3, 1, 7), 1), "a 1 b -> a b", 2),
    (of(aten.transpose.int, A, -1, 0), "a b c -> c b a", 3),
    (of(aten.permute.default, A, [2, 0, -2]), "a b c -> c a b", 3),
    (of(aten.expand.default, x(3, 1, 7), [2, 3, 5, -1]), "a 1 b -> c a d b", 4),
    (of(aten.repeat.default, A, [2, 1, 3, 1]), "a b c -> d a (e b) c, whole=d e", 3),
    (of(aten.repeat_interleave.self_int, A, 2, 1), "a b c -> a (b d) c, whole=d", 3),
    (of(aten.chunk.default, A, 2, 1), "a (b + c) d -> a b d, a c d", 4),
    (of(aten.split_with_sizes.default, A, [4, 6], -2), "a (b + c) d -> a b d, a c d", 4),
    (of(aten.slice.Tensor, A, 1, 0, 10), "a b c -> a b c", 3),
    (of(aten.slice.Tensor, A, 1, 2, 8), "a b c -> a d c, trim=b d", 2),
    (of(aten.slice.Tensor, A, 1, 1, LAST, 2), "a (b c) d -> a b d, whole=c", 3),
    (of(aten.slice.Tensor, A, 1, 1, 8, 3), "a b c -> a d c, whole=b d", 2),
    (of(aten.select.int, A, 1, 3), "a b c -> a c, select=b", 2),
    (
        of(aten.slice_scatter.default, A, x(3, 4, 7), 1, 2, 6),
        "a (b + c + d) e, a c e -> a (b + c + d) e",
        5,
    ),
    (of(aten.slice_scatter.default, A, x(3, 4, 7), 1, -4), "a (b + c) d, a c d -> a (b + c) d", 4),
    (
        of(aten.slice_scatter.default, A, x(3, 5, 7), 1, 0, 10, 2),
        "a b c, d e f -> g h i, whole=a b c d e f g h i",
        0,
    ),
    (of(aten.pad.default, A, [1, 2]), "a b c -> a b (d + c + e), whole=e", 3),
    (of(aten.pad.default, A, [0, -2]), "a b c -> a b d, whole=c d", 2),
    (of(aten.pad.default, A, [2, -2]), "a b c -> a b c, halo=c", 2),
    (of(aten.pad.default, A, [2, 2], "reflect"), "a b c -> a b d, whole=c d", 2),
    (of(aten.gather.default, A, 1, ids(10, 3, 4, 7)), "a b c, a d c -> a d c, select=b", 3),
    (
        of(aten.gather.default, A, 1, ids(10, 2, 4, 5)),
        "a b c, d e f -> d e f, select=b, whole=a c d f",
        1,
    ),
    (of(aten.diff.default, A, 1, 1), "a b c, ,  -> a d c, whole=b d", 2),
    (joined(1, A, x(3, 4, 7), op=aten.cat.default), "a b c, a d c -> a (b + d) c", 4),
    (joined(1, x(0), A, op=aten.cat.default), "a, b c d -> b c d", 3),
    (joined(1, A, B, op=aten.stack.default), "a b c, a b c -> a d b c, whole=d", 3),
    ((tiled, (A,)), "a b c, a d c -> a (b + d) c", 10),
    ((halves_again, (A,)), "a (b + b + b) c -> a (b + b) c", 6),
    ((padded_range, (A,)), "a b c, a d c -> a e c, whole=b d e", 4),
    (
        (lambda p, i: aten.index.Tensor(p, [None, i]), (A, ids(10, 4))),
        "a b c, d -> a d c, select=b",
        3,
    ),
    (
        (lambda p, i, j: aten.index.Tensor(p, [i, j]), (A, ids(3, 11, 1), ids(10, 4))),
        "a b c, d 1, e -> d e c, select=a b",
        3,
    ),
    (
        (lambda p, i, j: aten.index.Tensor(p, [i, None, j]), (A, ids(3, 11), ids(7, 11))),
        "a b c, d, d -> d b, select=a c",
        2,
    ),
]


@pytest.mark.parametrize("sample,text,cuts", CASES, ids=[c[1] for c in CASES])
def test_factors_of_a_view(sample: Sample, text: str, cuts: int) -> None:
    fn, tensors = sample
    assert applied(fn, *tensors) == (text, cuts)


@pytest.mark.parametrize(
    "args,size,ends",
    [
        ({"start": None, "end": None}, 10, (0, 10, 1)),
        ({"start": -4, "end": -1, "step": 2}, 10, (6, 9, 2)),
        ({"start": 3, "end": LAST}, 10, (3, 10, 1)),
    ],
)
def test_bounds_are_counted_from_the_front(args: dict, size: int, ends: tuple) -> None:
    assert bounds(args, size) == ends
