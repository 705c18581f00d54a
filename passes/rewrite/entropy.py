"""The cross-entropy spelled out: -log softmax(logits)[label], then torch's reductions.

In: the node, and what takes the nodes that stand for it. Out: the value of the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from tspc.base.context import Arguments
from tspc.ir.binding import bind
from tspc.ir.builder import Builder
from tspc.ir.program import Node, Ref, Size
from tspc.ops import library as ops  # noqa: F401  defines tspc::pick
from tspc.seams.tensors import OpOverload

aten = torch.ops.aten


@dataclass
class _Writer:
    """Nodes in the place of the one at hand."""

    builder: Builder

    def emit(
        self, op: OpOverload, args: Arguments, shape: tuple[Size, ...], dtype: torch.dtype
    ) -> Ref:
        return self.builder.of(op, args, shape, dtype)

    def classes_last(self, logits: Ref) -> Ref:
        """From [N, V, ...]."""
        t = self.builder.type(logits)
        rank = len(t.shape)
        if rank <= 2:
            return logits
        order = (0, *range(2, rank), 1)
        shape = tuple(t.shape[k] for k in order)
        return self.emit(aten.permute.default, (logits, order), shape, t.dtype)

    def cleared(self, x: Ref, ignored: Ref) -> Ref:
        t = self.builder.type(x)
        return self.emit(aten.masked_fill.Scalar, (x, ignored, 0), t.shape, t.dtype)

    def summed(self, x: Ref) -> Ref:
        dtype = self.builder.type(x).dtype
        return self.emit(aten.sum.default, (x,), (), torch.int64 if dtype == torch.bool else dtype)

    def binary(self, op: OpOverload, x: Ref, y: object) -> Ref:
        """Of the shape and type of the first."""
        t = self.builder.type(x)
        return self.emit(op, (x, y), t.shape, t.dtype)


def cross_entropy(b: Builder, n: Node) -> Ref:
    """-log softmax(logits)[label] = logsumexp(logits) - logits[label], then torch's reductions."""
    bound, _ = bind(n)
    labels, weight, smoothing = bound["target"], bound["weight"], bound["label_smoothing"]
    if b.type(labels).dtype.is_floating_point or (smoothing and weight is not None):
        return b.add(n)  # no rule, runs replicated
    w = _Writer(b)
    logits = w.classes_last(bound["self"])
    t = b.type(logits)
    rows, classes, dtype = t.shape[:-1], t.shape[-1], t.dtype
    kept = w.emit(aten.ne.Scalar, (labels, bound["ignore_index"]), rows, torch.bool)
    ignored = w.emit(aten.logical_not.default, (kept,), rows, torch.bool)
    safe = w.cleared(labels, ignored)
    lse = w.emit(aten.logsumexp.default, (logits, (len(rows),)), rows, dtype)
    picked = w.emit(torch.ops.tspc.pick.default, (logits, safe), rows, dtype)
    terms, factor = [w.binary(aten.sub.Tensor, lse, picked)], None
    if weight is not None:
        factor = w.emit(aten.index.Tensor, (weight, (safe,)), rows, dtype)
        terms = [w.binary(aten.mul.Tensor, terms[0], factor)]
    terms[0] = w.cleared(terms[0], ignored)
    if smoothing:
        every_class = w.emit(aten.sum.dim_IntList, (logits, (len(rows),)), rows, dtype)
        scaled = w.binary(aten.mul.Scalar, lse, classes)
        terms.append(w.cleared(w.binary(aten.sub.Tensor, scaled, every_class), ignored))
    if bound["reduction"] != 0:
        terms = [w.summed(x) for x in terms]
    if bound["reduction"] == 1:
        counted = w.summed(kept if factor is None else w.cleared(factor, ignored))
        terms = [w.binary(aten.div.Tensor, x, counted) for x in terms]
    if not smoothing:
        return terms[0]
    total = w.binary(aten.mul.Scalar, terms[0], 1 - smoothing)
    extra = w.binary(aten.mul.Scalar, terms[1], _ratio(smoothing, classes))
    return w.binary(aten.add.Tensor, total, extra)


def _ratio(smoothing: float, classes: Size) -> float | sympy.Expr:
    return smoothing / classes if isinstance(classes, int) else sympy.Float(smoothing) / classes
