"""Rules of ops that sort, and of those that read or write the places that an index says."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tspc.factors.factor import Dims
from tspc.factors.notation import Op, fallback
from tspc.factors.registry import computed
from tspc.rules.norm import at

aten = torch.ops.aten


@computed(aten.topk.default)
def topk(op: Op) -> Sequence[Dims]:
    """As many as asked for of the dim, which is needed whole."""
    k = at(op, op.args["dim"])
    op.event("whole", op.ins[0][k], 0, "topk")
    out = list(op.ins[0])
    out[k] = op.new(op.shape()[k], "topk")
    return [out, list(out)]


@computed(aten.one_hot.default)
def one_hot(op: Op) -> Sequence[Dims]:
    return [[*op.ins[0], op.new(op.shape()[-1], "classes")]]


@computed(aten.index_select.default)
def index_select(op: Op) -> Sequence[Dims]:
    k = at(op, op.args["dim"])
    op.event("select", op.ins[0][k], 0)
    return [[*op.ins[0][:k], *(op.ins[1] or [()]), *op.ins[0][k + 1 :]]]


@computed(
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
)
def scatter(op: Op) -> Sequence[Dims]:
    """Operands in step along the other dims; the dim itself is needed whole. What covers only a
    range of a dim needs it whole too."""
    k, F = at(op, op.args["dim"]), op.F
    dims = [list(d) for d in op.ins]
    for j in range(len(dims[0])):
        same = all(F.same(F.size(d[j]), F.size(dims[0][j])) for d in dims)
        if j == k or not same:
            for i, d in enumerate(dims):
                op.event("whole", d[j], i, "scatter")
            continue
        joined = dims[0][j]
        for i, d in enumerate(dims[1:], 1):
            joined = op.join(joined, d[j], 0, i)
        for d in dims:
            d[j] = joined
    op.ins = [d if w else old for d, old, w in zip(dims, op.ins, op.weak)]
    return [dims[0]]


@computed(aten.index_add.default, aten.index_copy.default)
def index_add(op: Op) -> Sequence[Dims]:
    """Rows of the source are laid in, or added to, rows of the other."""
    k = at(op, op.args["dim"])
    x, index, source = op.ins
    op.event("whole", x[k], 0, "index")
    op.event("whole", source[k], 2, "index")
    for d in index:
        op.event("whole", d, 1, "index")
    out = [d if j == k else op.join(d, source[j], 0, 2) for j, d in enumerate(x)]
    for i in (0, 2):
        if op.weak[i]:
            op.ins[i] = [op.ins[i][j] if j == k else d for j, d in enumerate(out)]
    return [out]


@computed(aten.index_put.default)
def index_put(op: Op) -> Sequence[Dims]:
    """x[i, j] = values: the indexed dims, first in x, are needed whole, the others run in step."""
    x, values = op.ins[0], op.ins[-1]
    n = len(op.args["indices"])
    if any(r is None for r in op.args["indices"]) or len(values) < len(x) - n:
        return fallback(op, "an index behind a whole dim")
    lead = len(values) - (len(x) - n)
    for i, dims in enumerate(op.ins):
        for d in dims[:n] if i == 0 else dims[:lead] if i == len(op.ins) - 1 else dims:
            op.event("whole", d, i, "index")
    others = [op.join(d, values[lead + j], 0, len(op.ins) - 1) for j, d in enumerate(x[n:])]
    if op.weak[0]:
        op.ins[0] = [*x[:n], *others]
    if op.weak[-1]:
        op.ins[-1] = [*values[:lead], *(r if d else d for d, r in zip(values[lead:], others))]
    return [[*x[:n], *others]]
