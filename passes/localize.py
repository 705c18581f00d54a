"""Re-execute programs node by node on the tensors of one rank: sizes become local, conversions become tspc's ops.

In: a `Typed` program or the body of a fold. Out: plain functions on tensors and sizes, to be traced. A cut factor has its local
size; every other size, and a size that the model itself reads, is the global one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from tspc.factor import Factor, Factors
from tspc.program import CONSTANT, Node, Ref, Size, Type

aten = torch.ops.aten
Dims = Sequence[Sequence[Factor]]

SHAPED = {  # op -> index of its shape argument
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten.expand.default: 1,
    aten.broadcast_to.default: 1,
}
UNFLATTEN = (aten.unflatten.int, aten.flatten.using_ints, aten.squeeze.default)
SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
)
MEANS = {
    aten.mean.dim: aten.sum.dim_IntList,
    aten.mean.default: aten.sum.default,
}


@dataclass(frozen=True)
class Sizes:
    """Local sizes: symbols -> values (ints or SymInts), cut factors -> local size."""

    factors: Factors
    symbols: Mapping[sympy.Symbol, Any]
    cut: Mapping[Factor, Any]

    def value(self, size: Any) -> Any:
        """A global size."""
        if not isinstance(size, sympy.Expr):
            return size
        if not size.free_symbols:
            return int(size) if size.is_integer else float(size)
        return sympy_interp(PythonReferenceAnalysis, dict(self.symbols), size)

    def leaf(self, f: Factor) -> Any:
        """Of one resolved factor."""
        if f in self.cut:
            return self.cut[f]
        if f.cat:
            return sum(self.dim(d) for d in self.factors.flat(f.cat))
        return self.value(f.size)

    def dim(self, dim: Sequence[Factor]) -> Any:
        """The local size of a dim."""
        return math.prod(self.leaf(f) for f in self.factors.expand(tuple(dim)))

    def is_cut(self, dim: Sequence[Factor]) -> bool:
        return any(f in self.cut for f in self.factors.leaves(tuple(dim)))

    def around(self, dim: Sequence[Factor], f: Factor) -> tuple[Any, Any]:
        """(lead, trail): local sizes of what is major and minor of `f` in a dim that is a plain product."""
        leaves = self.factors.expand(tuple(dim))
        at = leaves.index(f)
        return self.dim(leaves[:at]), self.dim(leaves[at + 1 :])

    def before(self, dim: Sequence[Factor], start: int) -> Any:
        """Local elements of a dim before global element `start`, which lies on a segment bound."""
        leaves = self.factors.expand(tuple(dim))
        if not start or not leaves or not leaves[0].cat:
            return start
        rest = tuple(leaves[1:])
        minor, at, local = self.factors.size(rest), 0, 0
        for segment in self.factors.flat(leaves[0].cat):
            if at == start:
                break
            at += self.value(self.factors.size(segment) * minor)
            local += self.dim((*segment, *rest))
        assert at == start, f"a slice from {start} falls inside of a segment"
        return local


def call(
    node: Node,
    ins: Sequence[Dims | None],
    outs: Sequence[Dims],
    sizes: Sizes,
    get: Callable[[Ref], Any],
) -> Any:
    """One ordinary op on local tensors."""

    def argument(a: Any) -> Any:
        if isinstance(a, Ref):
            return get(a)
        if isinstance(a, (tuple, list)):
            return [argument(x) for x in a]
        return sizes.value(a)

    args = [argument(a) for a in node.args]
    kwargs = {k: argument(v) for k, v in node.kwargs.items()}
    dims_in: Dims = ins[0] if ins and ins[0] is not None else ()
    cut_out = any(sizes.is_cut(d) for d in outs[0])
    cut_in = any(sizes.is_cut(d) for d in dims_in)
    if cut_out or cut_in:
        if node.op in SHAPED:
            shape = [sizes.dim(d) for d in outs[0]]
            if node.op == aten.view.default:
                return args[0].reshape(shape)
            return node.op(args[0], shape)
        if node.op in UNFLATTEN:
            return args[0].reshape([sizes.dim(d) for d in outs[0]])
        if node.op in SPLITS:
            k = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(dims_in)
            if sizes.is_cut(dims_in[k]):
                return list(torch.split(args[0], [sizes.dim(o[k]) for o in outs], k))
        if node.op == aten.slice.Tensor:
            k = (args[1] if len(args) > 1 else 0) % len(dims_in)
            if sizes.is_cut(dims_in[k]):
                start = args[2] if len(args) > 2 and args[2] is not None else 0
                if isinstance(start, int) and start < 0:
                    start += sizes.value(sizes.factors.size(tuple(dims_in[k])))
                return args[0].narrow(k, sizes.before(dims_in[k], start), sizes.dim(outs[0][k]))
        if node.op in MEANS and _mean_cut(node, dims_in, sizes):
            return _mean(node, args, kwargs, dims_in, sizes)
    result = node.op(*args, **kwargs)
    return result


def _reduced(node: Node, rank: int) -> list[int]:
    dims = node.args[1] if len(node.args) > 1 else None
    if dims is None or dims == ():
        return list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, (tuple, list)) else (dims,))]


def _mean_cut(node: Node, dims: Dims, sizes: Sizes) -> bool:
    return any(sizes.is_cut(dims[k]) for k in _reduced(node, len(dims)))


def _mean(node: Node, args: list[Any], kwargs: dict[str, Any], dims: Dims, sizes: Sizes) -> Any:
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


def shape_of(dims: Dims, sizes: Sizes) -> list[Any]:
    return [sizes.dim(d) for d in dims]


def global_shape(shape: Sequence[Size], sizes: Sizes) -> list[Any]:
    return [sizes.value(s) for s in shape]
