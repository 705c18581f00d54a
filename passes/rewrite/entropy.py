"""The cross-entropy spelled out: -log softmax(logits)[label], then torch's reductions.

In: the node, and what takes the nodes that stand for it. Out: the value of the last.
"""

from __future__ import annotations

from typing import Protocol

import sympy
import torch

from tspc.base.context import Arguments
from tspc.ir.program import Node, Ref, Size, Type
from tspc.ops import library as ops  # noqa: F401  defines tspc::pick
from tspc.seams.tensors import OpOverload

aten = torch.ops.aten


class Builder(Protocol):
    """Of a program."""

    def add(self, node: Node) -> Ref:
        """The node's value."""
        ...

    def type(self, r: Ref) -> Type:
        """Of a value made before."""
        ...


def cross_entropy(b: Builder, n: Node) -> Ref:
    """-log softmax(logits)[label] = logsumexp(logits) - logits[label], then torch's reductions."""
    names = ("self", "target", "weight", "reduction", "ignore_index", "label_smoothing")
    defaults = (None, None, None, 1, -100, 0.0)
    bound = {
        k: n.args[i] if i < len(n.args) else n.kwargs.get(k, d)
        for i, (k, d) in enumerate(zip(names, defaults))
    }
    logits, labels, weight = bound["self"], bound["target"], bound["weight"]
    t, count = b.type(logits), 0

    def emit(
        op: OpOverload,
        args: Arguments,
        shape: tuple[Size, ...],
        dtype: torch.dtype,
        **kw: object,
    ) -> Ref:
        nonlocal count
        count += 1
        grad = dtype.is_floating_point and any(
            b.type(r).requires_grad for r in Node("", op, args).refs()
        )
        kind = Type(shape, dtype, grad)
        return b.add(Node(f"{n.name}.{count}", op, args, kw, (kind,), n.source))

    if b.type(labels).dtype.is_floating_point:
        return b.add(n)  # class probabilities: no rule, runs replicated
    rank = len(t.shape)
    if rank > 2:  # [N, V, ...]: classes last
        order = (0, *range(2, rank), 1)
        logits = emit(
            aten.permute.default, (logits, order), tuple(t.shape[k] for k in order), t.dtype
        )
        t = b.type(logits)
    rows, classes, dtype = t.shape[:-1], t.shape[-1], t.dtype
    boolean, index = torch.bool, b.type(labels).dtype
    kept = emit(aten.ne.Scalar, (labels, bound["ignore_index"]), rows, boolean)
    ignored = emit(aten.logical_not.default, (kept,), rows, boolean)
    safe = emit(aten.masked_fill.Scalar, (labels, ignored, 0), rows, index)
    lse = emit(aten.logsumexp.default, (logits, (len(rows),)), rows, dtype)
    picked = emit(torch.ops.tspc.pick.default, (logits, safe), rows, dtype)
    nll = emit(aten.sub.Tensor, (lse, picked), rows, dtype)
    factor = None
    if weight is not None:
        factor = emit(aten.index.Tensor, (weight, (safe,)), rows, dtype)
        nll = emit(aten.mul.Tensor, (nll, factor), rows, dtype)
    nll = emit(aten.masked_fill.Scalar, (nll, ignored, 0), rows, dtype)
    smoothing = bound["label_smoothing"]
    smooth = None
    if smoothing:
        if weight is not None:
            raise_unsupported = Node(n.name, n.op, n.args, n.kwargs, n.types, n.source)
            return b.add(raise_unsupported)
        summed = emit(aten.sum.dim_IntList, (logits, (len(rows),)), rows, dtype)
        scaled = emit(aten.mul.Scalar, (lse, classes), rows, dtype)
        smooth = emit(aten.sub.Tensor, (scaled, summed), rows, dtype)
        smooth = emit(aten.masked_fill.Scalar, (smooth, ignored, 0), rows, dtype)
    if bound["reduction"] == 0:
        total, extra = nll, smooth
        shape = rows
    else:
        shape = ()
        total = emit(aten.sum.default, (nll,), (), dtype)
        extra = emit(aten.sum.default, (smooth,), (), dtype) if smooth else None
    if bound["reduction"] == 1:
        if factor is not None:
            factor = emit(aten.masked_fill.Scalar, (factor, ignored, 0), rows, dtype)
            denominator = emit(aten.sum.default, (factor,), (), dtype)
        else:
            denominator = emit(aten.sum.default, (kept,), (), torch.int64)
        total = emit(aten.div.Tensor, (total, denominator), (), dtype)
        extra = emit(aten.div.Tensor, (extra, denominator), (), dtype) if extra else None
    if extra is not None:
        total = emit(aten.mul.Scalar, (total, 1 - smoothing), shape, dtype)
        extra = emit(aten.mul.Scalar, (extra, _ratio(smoothing, classes)), shape, dtype)
        total = emit(aten.add.Tensor, (total, extra), shape, dtype)
    return total


def _ratio(smoothing: float, classes: Size) -> float | sympy.Expr:
    return smoothing / classes if isinstance(classes, int) else sympy.Float(smoothing) / classes
