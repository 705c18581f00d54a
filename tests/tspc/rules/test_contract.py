"""Rules of contractions, convolutions, attention and look-ups, each applied to a sample, spelled,
and tried by brute force."""

from __future__ import annotations

import pytest
import torch

from tests.support.rules import applied
from tests.support.samples import Sample, ids, of, x
from tspc.ops.attention import ATTENTION
from tspc.ops.sequence import SEQUENCE_CONV
from tspc.rules import contract  # noqa: F401  declares the rules

aten = torch.ops.aten

ATTEND = aten.scaled_dot_product_attention.default
Q, K, V = x(3, 4, 5, 6), x(3, 4, 7, 6), x(3, 4, 7, 11)
FEW = {"enable_gqa": True}


def einsum(equation: str, *tensors: torch.Tensor) -> Sample:
    return (lambda *t: aten.einsum.default(equation, list(t))), tensors


def dropping(causal: bool) -> Sample:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return ATTENTION(q, k, v, None, s, dropout=0.5, causal=causal, grouped=True)

    return fn, (x(3, 4, 5, 6), x(3, 2, 7, 6), x(3, 2, 7, 11), ids(2**62, 3, 4, 5))


def under_a_predicate(q: torch.Tensor, k: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    return ATTENTION(q, k, k, data=data, predicate="(d0[k] == d0[q])")


CASES = [
    (of(aten.linear.default, x(3, 5, 7), x(11, 7), x(11)), "a b c, d c, d -> a b d, reduce=c", 4),
    (of(aten.mm.default, x(5, 7), x(7, 11)), "a b, b c -> a c, reduce=b", 3),
    (of(aten.bmm.default, x(3, 5, 7), x(3, 7, 11)), "a b c, a c d -> a b d, reduce=c", 4),
    (
        of(aten.baddbmm.default, x(1, 5, 11), x(3, 5, 7), x(3, 7, 11)),
        "1 a b, c a d, c d b -> c a b, reduce=d",
        4,
    ),
    (of(aten.outer.default, x(5), x(7)), "a, b -> a b", 2),
    (of(aten.embedding.default, x(13, 7), ids(13, 3, 5)), "a b, c d -> c d b, select=a", 3),
    (of(aten.addmm.default, x(11), x(5, 7), x(7, 11)), "a, b c, c a -> b a, reduce=c", 3),
    (of(aten.addmm.default, x(5, 11), x(5, 7), x(7, 11)), "a b, a c, c b -> a b, reduce=c", 3),
    (of(aten.matmul.default, x(7), x(7)), "a, a -> , reduce=a", 1),
    (of(aten.matmul.default, x(7), x(7, 5)), "a, a b -> b, reduce=a", 2),
    (of(aten.matmul.default, x(3, 5, 7), x(7)), "a b c, c -> a b, reduce=c", 3),
    (of(aten.matmul.default, x(7), x(3, 7, 5)), "a, b a c -> b c, reduce=a", 3),
    (
        of(aten.matmul.default, x(2, 1, 5, 7), x(3, 7, 11)),
        "a 1 b c, d c e -> a d b e, reduce=c",
        5,
    ),
    (einsum("bsh,bth->bst", x(3, 5, 7), x(3, 11, 7)), "a b c, a d c -> a b d, reduce=c", 4),
    (einsum("ij,jk", x(3, 5), x(5, 7)), "a b, b c -> a c, reduce=b", 3),
    (einsum("...i,ij->...j", x(2, 3, 5), x(5, 7)), "a b c, c d -> a b d, reduce=c", 4),
    (einsum("ii->i", x(5, 5)), "a b -> c, whole=a b c", 0),
    (
        of(aten.conv2d.default, x(2, 3, 9, 11), x(5, 3, 4, 2), x(5)),
        "a b c d, e b f g, e -> a e h i, whole=b c d f g h i",
        2,
    ),
    (
        of(aten.conv1d.default, x(3, 11), x(5, 3, 4)),
        "a b, c a d,  -> c e, reduce=a, whole=b d e",
        2,
    ),
    (
        of(aten.conv1d.default, x(2, 6, 11), x(6, 1, 4), x(6), [1], [0], [1], 6),
        "a b c, d 1 e, d -> a d f, whole=b c d e f",
        1,
    ),
    (
        of(SEQUENCE_CONV, x(2, 3, 11), x(5, 3, 4), x(5), 3, 1, 1),
        "a b c, d b e, d -> a d c, halo=c, whole=b e",
        2,
    ),
    (
        of(SEQUENCE_CONV, x(2, 3, 11), x(5, 3, 4), None, 0, 2, 1),
        "a b c, d b e,  -> a d c, halo=c, reduce=b, whole=e",
        3,
    ),
    (
        of(SEQUENCE_CONV, x(2, 6, 11), x(6, 1, 4), x(6), 1, 1, 0),
        "a b c, b 1 d, b -> a b c, halo=c, whole=d",
        2,
    ),
    (
        of(SEQUENCE_CONV, x(2, 6, 11), x(4, 3, 4), x(4), 1, 1, 2),
        "a b c, d e f, d -> a d c, halo=c, whole=b d e f",
        1,
    ),
    (of(ATTEND, Q, K, V), "a b c d, a b e d, a b f g,  -> a b c g, exchange=e f, whole=d", 4),
    (
        of(ATTEND, Q, K, V, None, 0.0, True),
        "a b c d, a b e d, a b f g,  -> a b c g, at=c, exchange=e f, whole=d",
        3,
    ),
    (
        of(ATTEND, Q, K, V, x(5, 7)),
        "a b c d, a b e d, a b f g, c h -> a b c g, exchange=e f h, whole=d",
        4,
    ),
    (
        of(ATTEND, x(3, 6, 5, 7), x(3, 2, 11, 7), x(3, 2, 11, 7), **FEW),
        "a (b c) d e, a b f e, a b g h,  -> a (b c) d h, exchange=f g, whole=e",
        5,
    ),
    (of(ATTEND, x(5, 4), x(7, 4), x(7, 11)), "a b, c b, d e,  -> a e, exchange=c d, whole=b", 2),
    (
        dropping(True),
        "a (b c) d e, a b f e, a b g h, , a (b c) d, ,  -> a (b c) d h, at=d i, exchange=f g, "
        "whole=e",
        4,
    ),
    (
        of(ATTENTION, Q, K, V, None, None, None, x(4)),
        "a b c d, a b e d, a b f g, , , , b -> a b c g, exchange=e f, whole=d",
        4,
    ),
]


@pytest.mark.parametrize("sample,text,cuts", CASES, ids=[c[1] for c in CASES])
def test_factors_of_a_contraction(sample: Sample, text: str, cuts: int) -> None:
    fn, tensors = sample
    assert applied(fn, *tensors) == (text, cuts)


def test_data_of_a_predicate_is_whole() -> None:
    text, _ = applied(under_a_predicate, x(3, 4, 7, 6), x(3, 4, 7, 6), ids(2, 3, 1, 7))
    operands = "a b c d, a b e d, a b e d, , , a 1 f, "
    assert text == f"{operands} -> a b c d, at=c, exchange=e, whole=d f"
