"""Run one ordinary op on the tensors of one rank: what it says of sizes becomes local.

A cut factor has its local size; every other size, and a size that the model itself reads, is the
global one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.types import IntLikeType

from tspc.base.context import Keywords
from tspc.factors.factor import Dims, Factor
from tspc.ir.program import CONSTANT, Node, Ref, Size, Type
from tspc.passes.analyse.sizes import Sizes

aten = torch.ops.aten
Get = Callable[[Ref], torch.Tensor]  # the value of a use
Results = torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...]

SHAPED = {  # op -> index of its shape argument
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten.expand.default: 1,
    aten.broadcast_to.default: 1,
}
VIEWS = (aten.view.default, aten._unsafe_view.default)
UNFLATTEN = (aten.unflatten.int, aten.flatten.using_ints, aten.squeeze.default)
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


def _argument(a: object, sizes: Sizes, get: Get) -> Any:
    """Not a closure over itself: such a cycle would keep the tensors that `get` reaches."""
    if isinstance(a, Ref):
        return get(a)
    if isinstance(a, (tuple, list)):
        return [_argument(x, sizes, get) for x in a]
    return sizes.value(a) if isinstance(a, sympy.Expr) else a


def call(
    node: Node,
    ins: Sequence[Dims],
    outs: Sequence[Dims],
    sizes: Sizes,
    get: Get,
) -> Results:
    """One ordinary op on local tensors."""
    args = [_argument(a, sizes, get) for a in node.args]
    kwargs = {k: _argument(v, sizes, get) for k, v in node.kwargs.items()}
    dims_in: Dims = ins[0] if ins else ()
    cut_out = any(sizes.is_cut(d) for d in outs[0])
    cut_in = any(sizes.is_cut(d) for d in dims_in)
    if cut_out or cut_in:
        if node.op in VIEWS or node.op in UNFLATTEN:
            return args[0].reshape([sizes.dim(d) for d in outs[0]])
        if node.op in SHAPED:
            return node.op(args[0], [sizes.dim(d) for d in outs[0]])
        if node.op in SPLITS:
            k = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(dims_in)
            if sizes.is_cut(dims_in[k]):
                return list(torch.split(args[0], [sizes.dim(o[k]) for o in outs], k))
        if node.op == aten.slice.Tensor:
            k = (args[1] if len(args) > 1 else 0) % len(dims_in)
            if sizes.is_cut(dims_in[k]):
                if len(args) > 4 and args[4] != 1:
                    return node.op(args[0], k, args[2], None, args[4])
                start = _start(args[2] if len(args) > 2 else None, dims_in[k], sizes)
                return args[0].narrow(k, sizes.before(dims_in[k], start), sizes.dim(outs[0][k]))
        if node.op == aten.slice_scatter.default and (at := _written(args, outs[0], sizes)):
            return node.op(args[0], args[1], *at)
        if node.op in MEANS and _mean_cut(node, dims_in, sizes):
            return _mean(node, args, kwargs, dims_in, sizes)
    if node.op in VIEWS:  # the clone that made it viewable may be gone
        return args[0].reshape(args[1])
    return node.op(*args, **kwargs)


def _written(
    args: Sequence[Any], dims: Dims, sizes: Sizes
) -> tuple[int, IntLikeType, IntLikeType] | None:
    """(dim, start, end) of the rows that a cut dim is written in; None along another one."""
    k = (args[2] if len(args) > 2 else 0) % len(dims)
    if not sizes.is_cut(dims[k]):
        return None
    local = sizes.before(dims[k], _start(args[3] if len(args) > 3 else None, dims[k], sizes))
    return k, local, local + args[1].shape[k]


def _start(start: Size | None, dim: Sequence[Factor], sizes: Sizes) -> Size:
    """Where a slice of a dim starts, counted from the front."""
    if isinstance(start, int) and start < 0:
        return start + sizes.value(sizes.factors.size(tuple(dim)))
    return start or 0


def _reduced(node: Node, rank: int) -> list[int]:
    dims = node.args[1] if len(node.args) > 1 else None
    if dims is None or dims == ():
        return list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, (tuple, list)) else (dims,))]


def _mean_cut(node: Node, dims: Dims, sizes: Sizes) -> bool:
    return any(sizes.is_cut(dims[k]) for k in _reduced(node, len(dims)))


def _mean(
    node: Node, args: Sequence[object], kwargs: Keywords, dims: Dims, sizes: Sizes
) -> torch.Tensor:
    """The local part of a mean: the sum over the local elements, divided by the whole count."""
    count = math.prod(
        sizes.value(sizes.factors.size(tuple(dims[k]))) for k in _reduced(node, len(dims))
    )
    return MEANS[node.op](*args, **kwargs) / count


def constant(node: Node, device: torch.device) -> torch.Tensor:
    """A constant node's tensor."""
    assert node.op == CONSTANT
    t: Type = node.type
    return torch.tensor(node.kwargs["value"], dtype=t.dtype, device=device).reshape(
        [int(s) for s in t.shape]
    )
