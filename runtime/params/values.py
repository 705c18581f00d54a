"""Stored parameters, their gradients and what is made of them, met by plain code: each op gives
one device's value, the same on all ranks.

What stays cut is a DTensor; what no longer is cut (a norm, a product of weights) is a plain tensor.
A plain tensor beside a stored one means the same on all ranks. What has no way of its own here is
gathered and run whole. DTensors on other meshes are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tspc.base.context import Arguments, Keywords
from tspc.base.errors import ShardedParameterError
from tspc.base.state import CODE, PROCESS, remembered
from tspc.runtime.params import gradients, noise, reductions
from tspc.runtime.params.stored import (
    chunk,
    claim,
    cuts,
    is_cut,
    is_ours,
    is_stored,
    parts,
    put,
    whole,
    wrap,
)
from tspc.runtime.params.views import parts_of, places
from tspc.seams.dtensor import dispatch_dtensors, is_traced, read_dtensors
from tspc.seams.tensors import (
    DTensorSpec,
    OpOverload,
    current_backward,
    return_and_correct_aliasing,
    tree_leaves,
    tree_map,
)

aten = torch.ops.aten


class Call(NamedTuple):
    """An op with shards among its operands, the tensors that it is called with."""

    op: OpOverload
    args: Arguments
    kwargs: Keywords
    shards: list[DTensor]
    operands: list[torch.Tensor]


Value = TypeVar("Value")
Ways = Callable[[Call], object]
_INSTALLED: list[bool] = remembered(PROCESS, [])
_WAYS: dict[OpOverload, Ways] = remembered(CODE, {})
# elementwise, without torch's tag
_EACH = {
    *("copy", "copy_", "fill", "fill_", "zero_", "masked_fill", "masked_fill_", "_to_copy"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "floor_divide", "floor_divide_"),
    *("detach", "detach_", "alias", "lift_fresh", "lift_fresh_copy"),
}
_NEW = {"new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"}
_MOVED = {
    *("t", "transpose", "permute", "unsqueeze", "select", "slice"),
    *("view", "_unsafe_view", "expand"),
}


def store_on(mesh: DeviceMesh) -> None:
    """Parameters are stored on it: from now on plain code finds whole values of them."""
    claim(mesh)
    if not _INSTALLED:
        _INSTALLED.append(True)
        # called from C++: inside of a compiled step Dynamo would take it for a frame of the user's
        dispatch_dtensors(torch.compiler.disable(_dispatch))
        read_dtensors(is_stored, whole)


def _dispatch(
    instead: Callable[..., object], op: OpOverload, args: Arguments, kwargs: Keywords
) -> object:
    if _WAYS.get(op) is _each and not kwargs:
        spec, replicated = _alike(args)
        if spec is not None and not op.is_view:
            local = op(*replicated)
            if op._schema.name.endswith("_"):
                return args[0]
            return wrap(local, spec) if isinstance(local, torch.Tensor) else _wraps(local, spec)
    operands = tensors(args) + (tensors(kwargs.values()) if kwargs else [])
    shards = [x for x in operands if isinstance(x, DTensor)]
    if not shards or not all(map(is_stored, shards)) or is_traced(shards[0]):
        return instead(op, args, kwargs)
    if torch.is_grad_enabled() and len(shards) < len(operands):
        for x in operands:
            if x.requires_grad and not isinstance(x, DTensor):
                gradients.stays_plain(x)
    way = _WAYS.get(op)
    if way is None:
        way = _WAYS[op] = _way(op)
    return way(Call(op, args, kwargs, shards, operands))


def _alike(args: Arguments) -> tuple[DTensorSpec | None, list[object]]:
    """What an elementwise op takes on a rank, where all is cut in one way; else None first."""
    spec, arguments = None, list[object]()
    for x in args:
        if isinstance(x, DTensor):
            if spec is None:
                spec = x._spec
                if not is_ours(spec.mesh) or is_traced(x):
                    return None, arguments
            elif spec.placements != x._spec.placements or spec.shape != x._spec.shape:
                return None, arguments
            arguments.append(x._local_tensor)
        elif isinstance(x, (torch.Tensor, list, tuple)):
            return None, arguments
        else:
            arguments.append(x)
    return spec, arguments


def _wraps(local: object, spec: DTensorSpec) -> object:
    return tree_map(lambda x: wrap(x, spec), local)


def tensors(values: Iterable[object]) -> list[torch.Tensor]:
    out = []
    for x in values:
        if isinstance(x, torch.Tensor):
            out.append(x)
        elif isinstance(x, (list, tuple)):
            out += [y for y in x if isinstance(y, torch.Tensor)]
    return out


def _way(op: OpOverload) -> Ways:
    name = op._schema.name.removeprefix("aten::")
    if torch.Tag.nondeterministic_seeded in op.tags:
        return _noise
    if name in _OWN:
        return _OWN[name]
    if name in reductions.KINDS and op not in reductions.ELSEWHERE:
        return _reduce
    if name.startswith(("_foreach_", "_fused_")):
        return _lists
    if name in _NEW:
        return _new
    if name in _MOVED:
        return _moved
    if _is_elementwise(op, name):
        return _each
    return _plainly


def _is_elementwise(op: OpOverload, name: str) -> bool:
    if torch.Tag.pointwise in op.tags or name in _EACH:
        return True
    same = getattr(aten, name.removesuffix("_"), None)
    overload = op._schema.overload_name or "default"
    return (
        name.endswith("_")
        and hasattr(same, overload)
        and torch.Tag.pointwise in getattr(same, overload).tags
    )


def fit(x: Value, lead: DTensor) -> Value | torch.Tensor:
    """What stands beside the part of `lead` in an elementwise op."""
    if not isinstance(x, torch.Tensor):
        return x
    if not isinstance(x, DTensor):
        return chunk(x, lead._spec) if x.dim() else x
    if x._spec.placements == lead._spec.placements and x.shape == lead.shape:
        return x._local_tensor
    return chunk(whole(x), lead._spec)


def _each(c: Call) -> object:
    """Elementwise: each rank does its part."""
    if c.op._schema.name.endswith("_"):
        lead = c.args[0]
        if not isinstance(lead, DTensor):
            return _plainly(c)
        c.op(*[fit(x, lead) for x in c.args], **{k: fit(x, lead) for k, x in c.kwargs.items()})
        return lead
    lead = _lead(c.shards, c.operands)
    if lead is None:
        return _plainly(c)
    local = c.op(*[fit(x, lead) for x in c.args], **{k: fit(x, lead) for k, x in c.kwargs.items()})
    result = _wraps(local, lead._spec)
    return return_and_correct_aliasing(c.op, c.args, c.kwargs, result) if c.op.is_view else result


def _lead(shards: Sequence[DTensor], operands: Sequence[torch.Tensor]) -> DTensor | None:
    """Which tensor's cut the result of an elementwise op has; None: it is plain."""
    if len(operands) == 1:
        return shards[0]
    shape = torch.broadcast_shapes(*[x.shape for x in operands])
    alike = [x for x in shards if x.shape == shape]
    lead = next((x for x in alike if is_cut(x)), None)
    plain = [x for x in operands if not isinstance(x, DTensor)]
    if lead is None:
        return alike[0] if alike and not plain and not any(map(is_cut, shards)) else None
    # between replicas a plain tensor that a loss comes from may differ: nothing cuts it
    is_ours = lead._spec.mesh.ndim > 1 and any(x.dim() or x.requires_grad for x in plain)
    return None if is_ours and _graphs() else lead


def _graphs() -> bool:
    """What is made here may be part of a loss, or of its gradient."""
    return torch.is_grad_enabled() or current_backward() != -1


def _plainly(c: Call) -> object:
    """Whole on every rank; what it writes into goes back to where it is stored.

    Of what is nowhere cut, the result is a DTensor too.
    """
    back: dict[int, DTensor] = {}
    cut = any(map(is_cut, c.shards))
    name = str(c.op._overloadpacket).removeprefix("aten.")

    def get(x: object) -> object:
        if not isinstance(x, DTensor):
            return x
        full = whole(x, name)
        back[id(full)] = x
        return full

    whole_args, named = tree_map(get, (tuple(c.args), dict(c.kwargs)))
    out = c.op(*whole_args, **named)
    for i, a in enumerate(c.op._schema.arguments):
        if a.alias_info is None or not a.alias_info.is_write:
            continue
        value = whole_args[i] if i < len(whole_args) else named.get(a.name)
        for x in tree_leaves(value):
            if id(x) in back and is_cut(back[id(x)]):
                put(back[id(x)], x)
    alone = not cut and len(c.shards) == len(c.operands)
    like = c.shards[0]._spec

    def give(x: object) -> object:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in back:
            return back[id(x)]
        scalar = x.dim() == 0 and max(y.dim() for y in c.shards) > 0
        return wrap(x, like, shape=x.shape) if alone and not scalar else x

    if c.op.is_view and cut and not (c.args[0].requires_grad and c.args[0].is_leaf and _graphs()):
        return parts_of(c.args[0], whole_args[0], out)
    result = tree_map(give, out)
    if c.op.is_view and alone and isinstance(result, DTensor):
        return return_and_correct_aliasing(c.op, c.args, c.kwargs, result)
    return result


def _lists(c: Call) -> object:
    """Ops on lists: each place by itself."""
    lists = [a for a in c.args if isinstance(a, (list, tuple)) and tensors([a])]
    writes = c.op._schema.name.endswith("_")
    leads: list[DTensor | None] = []
    for i in range(len(lists[0])):
        here = [x[i] for x in lists if len(x) == len(lists[0])]
        first = here[0] if isinstance(here[0], DTensor) else None
        stored = [x for x in here if isinstance(x, DTensor)]
        leads.append(first if writes else (_lead(stored, here) if stored else None))
    fused = c.op._schema.name.startswith("aten::_fused")
    if fused and any(
        lead is not None and not isinstance(x[i], DTensor) and x[i].dim()
        for x in lists
        for i, lead in enumerate(leads)
    ):
        return _plainly(c)

    def local(a: Any) -> object:
        if any(a is x for x in lists):
            return [whole(x) if k is None else fit(x, k) for x, k in zip(a, leads)]
        return whole(a)

    out = c.op(*map(local, c.args), **{k: local(v) for k, v in c.kwargs.items()})
    if isinstance(out, (list, tuple)):
        return [x if k is None else wrap(x, k._spec) for x, k in zip(out, leads)]
    return out


def _new(c: Call) -> object:
    """Made like another: cut where its shape is the same, else plain."""
    x, size, *trailing = c.args
    if not isinstance(x, DTensor):
        return _plainly(c)
    if tuple(size) != tuple(x.shape):
        return c.op(x._local_tensor, size, *map(whole, trailing), **c.kwargs)
    op = c.op
    if op is aten.new_empty_strided.default:
        op, trailing = aten.new_empty.default, []
    return wrap(op(x._local_tensor, x._local_tensor.shape, *trailing, **c.kwargs), x._spec)


def _moved(c: Call) -> object:
    """Dims that change places, and ranges of those that are not cut."""
    x = c.args[0]
    if len(c.operands) > 1 or not cuts(x._spec):
        return _plainly(c)
    named = {a.name: v for a, v in zip(c.op._schema.arguments, c.args)} | c.kwargs
    to = places(c.op._schema.name.removeprefix("aten::"), x, named)
    if any(d not in to for _, d in cuts(x._spec)):
        return _plainly(c)
    meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    arguments = list(c.args)
    if "size" in named:  # the sizes of this rank
        sizes = list(x._local_tensor.shape)
        arguments[1] = [*named["size"][: len(named["size"]) - len(sizes)], *sizes]
    shape = c.op(meta, *c.args[1:], **c.kwargs).shape
    local = c.op(x._local_tensor, *arguments[1:], **c.kwargs)
    placements = list(x._spec.placements)
    for k, d in cuts(x._spec):
        placements[k] = Shard(to[d])
    result = wrap(local, x._spec, placements, shape)
    return return_and_correct_aliasing(c.op, c.args, c.kwargs, result) if c.op.is_view else result


def _reduce(c: Call) -> object:
    if len(c.operands) == 1 and isinstance(c.args[0], DTensor) and is_cut(c.args[0]):
        result = reductions.reduce(c.op, c.args, c.kwargs)
        if result is not None:
            return result
    return _plainly(c)


def _noise(c: Call) -> object:
    with noise.of_first_rank(c.shards[0]._spec.mesh, c.kwargs.get("generator")):
        lead = c.args[0]
        if isinstance(lead, DTensor) and len(c.operands) == 1 and noise.ignores_values(c.op):
            full = torch.empty(lead.shape, dtype=lead.dtype, device=lead.device)
            result = c.op(full, *c.args[1:], **c.kwargs)
            if c.op._schema.name.endswith("_"):
                put(lead, full)
                return lead
            return wrap(chunk(result, lead._spec).clone(), lead._spec)
        result = _plainly(c)

    def cut(x: object) -> object:
        if not isinstance(x, torch.Tensor) or isinstance(x, DTensor):
            return x
        if isinstance(lead, DTensor) and x.shape == lead.shape:
            return wrap(chunk(x, lead._spec).clone(), lead._spec)
        return x

    return tree_map(cut, result)


def _equal(c: Call) -> object:
    lead = c.shards[0]
    if c.operands[0].shape != c.operands[1].shape:
        return False
    mine_is = torch.tensor(
        torch.equal(fit(c.args[0], lead), fit(c.args[1], lead)), device=lead.device
    )
    return bool(parts(mine_is, lead._spec, everyone=True).all())


def _unscale(c: Call) -> None:
    """Gradients of a GradScaler: what one rank finds infinite, all find."""
    grads, found_inf, scale = c.args
    c.op([getattr(g, "_local_tensor", g) for g in grads], found_inf, whole(scale))
    cut = next((g for g in c.shards if is_cut(g)), None)
    if cut is not None:
        found_inf.copy_(parts(found_inf, cut._spec, everyone=True).amax(0))


def _no_storage(c: Call) -> object:
    x, size, stride = c.args[:3]
    if (tuple(size), tuple(stride)) == (tuple(x.shape), x.stride()):
        return aten.alias.default(x)
    if x.is_contiguous():
        return _plainly(c)
    raise ShardedParameterError(
        "as_strided of a sharded tensor that is not contiguous: call full_tensor() first"
    )


_OWN: dict[str, Ways] = {
    "_local_scalar_dense": lambda c: whole(c.args[0]).item(),
    "equal": _equal,
    "allclose": lambda c: bool(torch.isclose(*c.args, **c.kwargs).all()),
    "_amp_foreach_non_finite_check_and_unscale_": _unscale,
    "as_strided": _no_storage,
    "is_same_size": lambda c: c.args[0].shape == c.args[1].shape,
    "is_pinned": lambda c: c.args[0]._local_tensor.is_pinned(),
    "_foreach_norm": lambda c: reductions.norms(c.op, c.args, c.kwargs),
    "_foreach_max": lambda c: [x.max() for x in c.args[0]],
}
