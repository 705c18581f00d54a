"""Samples of pointwise ops, products and reductions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.support.samples import Sample, ids, of, x

aten, pick = torch.ops.aten, torch.ops.tspc.pick.default


def pointwise_samples() -> list[Sample]:
    a, b, row, one = x(3, 5, 7), x(3, 5, 7), x(7), x(3, 1, 7)
    yes = lambda *t: t[0] > 0  # noqa: E731
    return [
        of(aten.add.Tensor, a, row),
        of(aten.mul.Tensor, a, one),
        of(aten.mul.Scalar, a, 2.0),
        of(aten.silu.default, a),
        of(aten.gelu.default, a, approximate="tanh"),
        of(aten.pow.Tensor_Scalar, a, 2),
        of(aten.neg.default, a),
        of(aten.clamp.default, a, 0.0),
        (lambda p, q, r: aten.where.self(yes(p), q, r), (a, b, row)),
        (lambda p, q: aten.where.ScalarOther(yes(p), q, 0.0), (a, b)),
        (lambda p, q: aten.where.ScalarSelf(yes(p), 0.0, q), (a, b)),
        (lambda p: aten.where.Scalar(yes(p), 0.0, 1.0), (a,)),
        (lambda p, q: aten.masked_fill.Scalar(q, yes(p), -1.0), (row, a)),
        of(aten.to.dtype, a, torch.float32),
        of(aten.to.dtype_layout, a, dtype=torch.float32),
        of(aten.to.device, a, "cpu", torch.float32),
        of(aten._to_copy.default, a, dtype=torch.float32),
        of(aten.contiguous.default, a),
        of(aten.clone.default, a),
        of(aten.dropout.default, a, 0.5, False),
        of(aten.alias.default, a),
        of(aten.detach.default, a),
        of(aten.lift_fresh_copy.default, a),
        of(aten.type_as.default, a, row),
        of(aten.copy.default, a, row),
        of(aten.zeros_like.default, a),
        of(aten.ones_like.default, a),
        of(aten.full_like.default, a, 2.0),
        (lambda p, q: aten.__and__.Tensor(yes(p), yes(q)), (a, b)),
        (lambda p, q: aten.__or__.Tensor(yes(p), yes(q)), (a, b)),
    ]


def contraction_samples() -> list[Sample]:
    attend = aten.scaled_dot_product_attention.default
    q, k, v = x(3, 4, 5, 6), x(3, 4, 7, 6), x(3, 4, 7, 11)
    return [
        of(aten.linear.default, x(3, 5, 7), x(11, 7), x(11)),
        of(aten.linear.default, x(7), x(11, 7)),
        of(aten.addmm.default, x(11), x(5, 7), x(7, 11)),
        of(aten.addmm.default, x(5, 11), x(5, 7), x(7, 11), beta=0.5, alpha=2.0),
        of(aten.addmm.default, x(5, 1), x(5, 7), x(7, 11)),
        of(aten.mm.default, x(5, 7), x(7, 11)),
        of(aten.bmm.default, x(3, 5, 7), x(3, 7, 11)),
        of(aten.baddbmm.default, x(3, 5, 11), x(3, 5, 7), x(3, 7, 11), beta=0.5),
        of(aten.baddbmm.default, x(1, 5, 11), x(3, 5, 7), x(3, 7, 11)),
        of(aten.matmul.default, x(7), x(7)),
        of(aten.matmul.default, x(7), x(7, 5)),
        of(aten.matmul.default, x(3, 5, 7), x(7)),
        of(aten.matmul.default, x(7), x(3, 7, 5)),
        of(aten.matmul.default, x(2, 3, 5, 7), x(3, 7, 11)),
        of(aten.matmul.default, x(2, 1, 5, 7), x(3, 7, 11)),
        (lambda p, q: aten.einsum.default("bsd, btd -> bst", [p, q]), (x(3, 5, 7), x(3, 11, 7))),
        (lambda p, q: aten.einsum.default("ij,jk", [p, q]), (x(3, 5), x(5, 7))),
        (lambda p: aten.einsum.default("ijk->kj", [p]), (x(3, 5, 7),)),
        (lambda p, q: aten.einsum.default("...ij,jk->...ik", [p, q]), (x(2, 3, 5), x(5, 7))),
        (lambda p: aten.einsum.default("ii->i", [p]), (x(5, 5),)),
        (lambda p, q, r: aten.einsum.default("a,b,ab->", [p, q, r]), (x(3), x(5), x(3, 5))),
        of(aten.conv2d.default, x(2, 3, 9, 11), x(5, 3, 4, 2), x(5), [2, 3], [1, 0]),
        of(aten.conv2d.default, x(2, 3, 9, 11), x(5, 3, 4, 2)),
        of(aten.conv2d.default, x(2, 6, 9, 11), x(4, 3, 2, 2), x(4), groups=2),
        of(aten.conv2d.default, x(2, 6, 9, 11), x(6, 1, 2, 2), groups=6),
        of(aten.embedding.default, x(13, 7), ids(13, 3, 5)),
        of(attend, q, k, v),
        of(attend, q, k, v, is_causal=True),
        of(attend, q, k, v, x(3, 4, 5, 7)),
        of(attend, q, k, v, x(3, 1, 5, 7)),
        of(attend, q, k, v, x(5, 7)),
        of(attend, q, k, v, x(5, 1)),
        of(attend, x(3, 6, 5, 7), x(3, 2, 11, 7), x(3, 2, 11, 7), enable_gqa=True),
        of(attend, x(3, 6, 5, 7), x(3, 2, 5, 7), x(3, 2, 5, 7), x(3, 6, 5, 5), enable_gqa=True),
        of(attend, x(3, 5, 6), x(3, 7, 6), x(3, 7, 6)),
        of(pick, x(3, 5, 7), ids(7, 3, 5)),
        (in_range, (x(3, 5, 7),)),
    ]


def in_range(p: torch.Tensor) -> torch.Tensor:
    return torch.ops.tspc.in_range.default((p > 0).long(), 2, "here")


def positive(op: Any, p: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return op(p > 0, 1, **kwargs)


def reduction_samples() -> list[Sample]:
    a = x(3, 5, 7)
    out = [
        of(aten.rms_norm.default, a, [7], x(7)),
        of(aten.rms_norm.default, a, [5, 7]),
        of(aten.layer_norm.default, a, [7], x(7), x(7)),
        of(aten.layer_norm.default, a, [7]),
        of(aten.sum.default, a),
        of(aten.mean.default, a),
        of(aten.cumsum.default, a, 1),
        of(aten.flip.default, a, [1, 2]),
        of(aten.flip.default, a, [-1]),
        of(aten.max.dim, a, 1),
        of(aten.argmax.default, a, 1),
        of(aten.argmax.default, a, 1, True),
        of(aten.argmax.default, a),
    ]
    for op in (aten.softmax.int, aten.log_softmax.int):
        out += [of(op, a, 1), of(op, a, -1, torch.float32)]
    out.append(of(aten._softmax.default, a, -2, False))
    for op in (aten.sum.dim_IntList, aten.mean.dim, aten.logsumexp.default, aten.amax.default):
        out += [of(op, a, [1]), of(op, a, [0, -1]), of(op, a, [-2], True)]
    out += [of(aten.sum.dim_IntList, a, []), of(aten.mean.dim, a, None)]
    for op in (aten.var.dim, aten.std.dim):
        out += [of(op, a, [1]), of(op, a, [0, 2], False, True)]
    for op, p in ((aten.any.dim, a), (aten.all.dim, a + 2)):
        out += [(partial(positive, op), (p,)), (partial(positive, op, keepdim=True), (p,))]
    return out
