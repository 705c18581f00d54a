"""Sums, norms, extremes of stored tensors: each rank's part, then the parts of all ranks, in one
order, so that the result is the same to the last bit everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.distributed.tensor import DTensor, Shard

from tspc.base.context import Arguments, Keywords
from tspc.runtime.params.stored import cuts, is_cut, parts, whole, wrap
from tspc.seams.tensors import OpOverload

aten = torch.ops.aten
_LOW = (torch.bfloat16, torch.float16)
Combine = Callable[[torch.Tensor], torch.Tensor]
# how the parts of the ranks, stacked, become one
KINDS: dict[str, Combine] = {
    "sum": lambda x: x.sum(0),
    "nansum": lambda x: x.sum(0),
    "mean": lambda x: x.sum(0),
    "prod": lambda x: x.prod(0),
    "any": lambda x: x.any(0),
    "all": lambda x: x.all(0),
    "amax": lambda x: x.amax(0),
    "amin": lambda x: x.amin(0),
    "max": lambda x: x.amax(0),
    "min": lambda x: x.amin(0),
    "count_nonzero": lambda x: x.sum(0),
    "logsumexp": lambda x: torch.logsumexp(x, 0),
    "linalg_vector_norm": lambda x: x,
    "norm": lambda x: x,
    "var": lambda x: x,
    "std": lambda x: x,
    "var_mean": lambda x: x,
    "std_mean": lambda x: x,
}
# not reductions, or of values and places
ELSEWHERE = {
    op
    for name in ("max", "min")
    for op in (getattr(getattr(aten, name), o) for o in getattr(aten, name).overloads())
    if op._schema.overload_name
}
_SPREAD = ("var", "std", "var_mean", "std_mean")


def reduce(op: OpOverload, args: Arguments, kwargs: Keywords) -> object:
    """The result, cut where no dim that is cut goes, else plain; None where there is no way.

    args: of an op of `KINDS`, its first the stored tensor.
    """
    x: DTensor = args[0]
    name = op._schema.name.removeprefix("aten::")
    named = {a.name: v for a, v in zip(op._schema.arguments, args)} | kwargs
    dims = _dims(named.get("dim"), x.dim())
    keep = bool(named.get("keepdim", False))
    gone = [d for _, d in cuts(x._spec)]
    if not x.numel() or x.dtype.is_complex:
        return None
    if not any(d in dims for d in gone):
        return _along(op, args, kwargs, x, dims, keep)
    if not all(d in dims for d in gone):
        return None
    if name in _SPREAD:
        return _spread(name, x, dims, named, keep)
    if name in ("linalg_vector_norm", "norm"):
        order = named.get("ord", named.get("p"))
        order = 2.0 if order is None else float(order)
        return _norms([x], order, dims, keep, named.get("dtype"))[0]
    wanted = named.get("dtype") or (x.dtype if x.dtype.is_floating_point else None)
    low = name in ("sum", "nansum", "mean", "prod", "logsumexp") and wanted in _LOW
    local = x._local_tensor
    if named.get("dtype") is not None:
        local = local.to(named["dtype"])
    local = local.float() if low else local
    part = _part(name, local, dims, keep)
    out = KINDS[name](parts(part, x._spec))
    if name == "mean":
        out = out / math.prod(x.shape[d] for d in dims)
    return out.to(wanted) if low else out


def _dims(dim: int | Sequence[int] | None, n: int) -> list[int]:
    if isinstance(dim, int):
        return [dim % n]
    return [d % n for d in dim] if dim else list(range(n))


def _part(name: str, local: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    """This rank's; of no meaning where it holds no rows, but of the same shape and type."""
    if not local.numel():
        shape = [max(1, n) for n in local.shape]
        local = local.new_ones(shape)
    if name in ("sum", "mean"):
        return torch.sum(local, dims, keepdim=keep)
    if name == "nansum":
        return torch.nansum(local, dims, keepdim=keep)
    if name == "prod":
        for d in sorted(dims, reverse=True):
            local = torch.prod(local, d, keepdim=keep)
        return local
    if name == "count_nonzero":
        return torch.count_nonzero(local, dims)
    if name == "logsumexp":
        return torch.logsumexp(local, dims, keepdim=keep)
    make: Callable[..., torch.Tensor] = getattr(
        torch, {"max": "amax", "min": "amin"}.get(name, name)
    )
    return make(local, dims, keepdim=keep)


def _along(
    op: OpOverload, args: Arguments, kwargs: Keywords, x: DTensor, dims: list[int], keep: bool
) -> DTensor | tuple[DTensor, ...]:
    """No dim that is cut goes: each rank's rows by themselves."""
    to = {d: d if keep else d - sum(k < d for k in dims) for _, d in cuts(x._spec)}
    placements = list(x._spec.placements)
    for k, d in cuts(x._spec):
        placements[k] = Shard(to[d])
    shape = [1 if d in dims else n for d, n in enumerate(x.shape) if keep or d not in dims]
    out = op(x._local_tensor, *args[1:], **kwargs)
    if isinstance(out, tuple):
        return tuple(wrap(m, x._spec, placements, shape) for m in out)
    return wrap(out, x._spec, placements, shape)


def _spread(
    name: str, x: DTensor, dims: list[int], named: Keywords, keep: bool
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Variances, in two rounds."""
    count = math.prod(x.shape[d] for d in dims)
    correction = named.get("correction")
    if "unbiased" in named:
        correction = int(named["unbiased"])
    local = x._local_tensor.float() if x.dtype in _LOW else x._local_tensor
    total = parts(_part("sum", local, dims, True), x._spec).sum(0)
    mean = total / count
    squares = (local - mean).square()
    sum_of = parts(_part("sum", squares, dims, True), x._spec).sum(0)
    less = max(count - (1 if correction is None else correction), 0)
    spread = sum_of / less
    out = [spread.sqrt() if name.startswith("std") else spread, mean]
    if not keep:
        kept = [n for d, n in enumerate(x.shape) if d not in dims]
        out = [v.reshape(kept) for v in out]
    out = [v.to(x.dtype) for v in out]
    return tuple(out) if name.endswith("mean") else out[0]


def norms(op: OpOverload, args: Arguments, kwargs: Keywords) -> list[torch.Tensor]:
    """`_foreach_norm`: one exchange for all of them."""
    named = {a.name: v for a, v in zip(op._schema.arguments, args)} | kwargs
    order = named.get("ord", 2)
    tensors, settings = list(args[0]), {"dtype": named.get("dtype")}
    cut = [i for i, x in enumerate(tensors) if isinstance(x, DTensor) and is_cut(x)]
    out: dict[int, torch.Tensor] = {}
    groups: dict[object, list[int]] = {}
    for i in cut:
        x = tensors[i]
        where = tuple(k for k, _ in cuts(x._spec))
        groups.setdefault((x._spec.mesh, where, x.dtype), []).append(i)
    for members in groups.values():
        xs = [tensors[i] for i in members]
        of_group = _norms(xs, float(order), None, False, settings["dtype"])
        for i, x in zip(members, of_group):
            out[i] = x
    for i, x in enumerate(tensors):
        if i not in out:
            out[i] = torch.linalg.vector_norm(whole(x), order, **settings)
    return [out[i] for i in range(len(tensors))]


def _norms(
    xs: Sequence[DTensor],
    order: float,
    dims: list[int] | None,
    keep: bool,
    dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    """Norms of tensors that are cut over the same dims of one mesh; with dims, of one."""
    asked = dtype or xs[0].dtype
    exact = torch.float32 if asked in _LOW else asked
    norms_here = []
    for x in xs:
        local = x._local_tensor
        if not local.numel():
            # nothing to add; where all is added up or compared with, the neutral element
            local = local.new_full([max(1, n) for n in local.shape], 0.0)
            if order < 0:
                local = local + math.inf
        norms_here.append(torch.linalg.vector_norm(local, order, dims, keepdim=keep, dtype=exact))
    shapes = [m.shape for m in norms_here]
    gathered = parts(torch.cat([m.reshape(-1) for m in norms_here]), xs[0]._spec, everyone=True)
    one = gathered.sum(0) if order == 0 else torch.linalg.vector_norm(gathered, order, 0)
    sizes = [s.numel() for s in shapes]
    return [v.reshape(s).to(asked) for v, s in zip(one.split(sizes), shapes)]
