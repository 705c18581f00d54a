"""One ordinary op as one rank runs it: what it says of sizes becomes local.

A cut factor has its local size; every other size, and a size that the model itself reads, is the
global one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from tspc.factors.factor import Dim, Dims, Factor
from tspc.ir.builder import Builder
from tspc.ir.program import Node, Ref, Size, Type
from tspc.passes.analyse.sizes import Sizes

aten = torch.ops.aten
VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.squeeze.default,
)
EXPANDS = (aten.expand.default, aten.broadcast_to.default)
SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.chunk.default,
    aten.tensor_split.sections,
)
MEANS = {
    aten.mean.dim: aten.sum.dim_IntList,
    aten.mean.default: aten.sum.default,
}


def types(n: Node, outs: Sequence[Dims], sizes: Sizes) -> tuple[Type | None, ...]:
    """Of the node's results as they are here. outs: their dims."""
    return tuple(t and replace(t, shape=sizes.shape(d)) for t, d in zip(n.types, outs))


def lower(b: Builder, n: Node, ins: Sequence[Dims], outs: Sequence[Dims], sizes: Sizes) -> Ref:
    """The node at hand, as it is on local tensors. ins, outs: dims of its tensors."""
    dims: Dims = ins[0] if ins else ()
    if not any(sizes.is_cut(d) for d in (*outs[0], *dims)):
        return b.end(n.op, *n.args, **n.kwargs)
    x = n.argument(0)
    if n.op in VIEWS:
        return b.end(aten.reshape.default, x, sizes.shape(outs[0]))
    if n.op in EXPANDS:
        return b.end(n.op, x, sizes.shape(outs[0]))
    if n.op in SPLITS:
        k = n.argument(2, n.kwargs.get("dim", 0)) % len(dims)
        if sizes.is_cut(dims[k]):
            return b.end(SPLITS[1], x, tuple(sizes.dim(o[k]) for o in outs), k)
    if n.op == aten.slice.Tensor and sizes.is_cut(dims[k := n.argument(1, 0) % len(dims)]):
        return _slice(b, n, k, dims[k], sizes.dim(outs[0][k]), sizes)
    if n.op == aten.slice_scatter.default:
        k = n.argument(2, 0) % len(outs[0])
        if sizes.is_cut(outs[0][k]):
            first = sizes.before(outs[0][k], _start(n.argument(3), outs[0][k], sizes))
            return b.end(n.op, x, n.args[1], k, first, first + sizes.dim(ins[1][k]))
    if n.op in MEANS:
        over = _reduced(n, len(dims))
        if any(sizes.is_cut(dims[k]) for k in over):
            total = b.emit(MEANS[n.op], *n.args, **n.kwargs)
            count = math.prod(sizes.factors.size(tuple(dims[k])) for k in over)
            return b.end(aten.div.Tensor, total, count)
    return b.end(n.op, *n.args, **n.kwargs)


def _slice(b: Builder, n: Node, k: int, dim: Dim, count: Size, sizes: Sizes) -> Ref:
    if n.argument(4, 1) != 1:
        return b.end(n.op, n.args[0], k, n.args[2], None, n.args[4])
    first = sizes.before(dim, _start(n.argument(2), dim, sizes))
    return b.end(aten.narrow.default, n.args[0], k, first, count)


def _start(start: Size | None, dim: Sequence[Factor], sizes: Sizes) -> Size:
    """Where a slice of a dim starts, counted from the front."""
    if isinstance(start, int) and start < 0:
        return start + sizes.factors.size(tuple(dim))
    return start or 0


def _reduced(n: Node, rank: int) -> list[int]:
    dims = n.argument(1)
    if dims is None or dims == ():
        return list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, (tuple, list)) else (dims,))]
