"""Stored parameters, their gradients and what is made of them, met by plain code: each op gives
one device's value, the same on all ranks.

What stays cut is a DTensor; what no longer is cut (a norm, a product of weights) is a plain tensor.
A plain tensor beside a stored one means the same on all ranks. What has no way of its own here is
gathered and run whole. DTensors on other meshes are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from tspc.dtensor_seams import dispatch_dtensors, is_traced, read_dtensors
from tspc.errors import ShardedParameterError
from tspc.runtime import gradients, noise, reductions
from tspc.runtime.stored import (
    chunk,
    cuts,
    is_cut,
    is_ours,
    is_stored,
    own,
    parts,
    put,
    whole,
    wrap,
)
from tspc.runtime.views import parts_of, places

aten = torch.ops.aten
Ways = Callable[[Any, Any, Any, list[DTensor], list[torch.Tensor]], Any]
_INSTALLED: list[bool] = []
_WAYS: dict[Any, Ways] = {}
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
    own(mesh)
    if not _INSTALLED:
        _INSTALLED.append(True)
        # called from C++: inside of a compiled step Dynamo would take it for a frame of the user's
        dispatch_dtensors(torch.compiler.disable(_dispatch))
        read_dtensors(is_stored, whole)


def _dispatch(instead: Any, op: Any, args: Any, kwargs: Any) -> Any:
    if _WAYS.get(op) is _each and not kwargs:
        spec, given = _alike(args)
        if spec is not None and not op.is_view:
            local = op(*given)
            if op._schema.name.endswith("_"):
                return args[0]
            return wrap(local, spec) if isinstance(local, torch.Tensor) else _wraps(local, spec)
    found = tensors(args) + (tensors(kwargs.values()) if kwargs else [])
    mine = [x for x in found if isinstance(x, DTensor)]
    if not mine or not all(map(is_stored, mine)) or is_traced(mine[0]):
        return instead(op, args, kwargs)
    if torch.is_grad_enabled() and len(mine) < len(found):
        for x in found:
            if x.requires_grad and not isinstance(x, DTensor):
                gradients.stays_plain(x)
    way = _WAYS.get(op)
    if way is None:
        way = _WAYS[op] = _way(op)
    return way(op, args, kwargs, mine, found)


def _alike(args: Any) -> tuple[Any, list[Any]]:
    """What an elementwise op takes on a rank, where all is cut in one way; else None first."""
    spec, given = None, []
    for x in args:
        if isinstance(x, DTensor):
            if spec is None:
                spec = x._spec
                if not is_ours(spec.mesh) or is_traced(x):
                    return None, given
            elif spec.placements != x._spec.placements or spec.shape != x._spec.shape:
                return None, given
            given.append(x._local_tensor)
        elif isinstance(x, (torch.Tensor, list, tuple)):
            return None, given
        else:
            given.append(x)
    return spec, given


def _wraps(local: Any, spec: Any) -> Any:
    return tree_map(lambda x: wrap(x, spec), local)


def tensors(values: Any) -> list[torch.Tensor]:
    found = []
    for x in values:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [y for y in x if isinstance(y, torch.Tensor)]
    return found


def _way(op: Any) -> Ways:
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


def _is_elementwise(op: Any, name: str) -> bool:
    if torch.Tag.pointwise in op.tags or name in _EACH:
        return True
    same = getattr(aten, name.removesuffix("_"), None)
    overload = op._schema.overload_name or "default"
    return (
        name.endswith("_")
        and hasattr(same, overload)
        and torch.Tag.pointwise in getattr(same, overload).tags
    )


def fit(x: Any, lead: DTensor) -> Any:
    """What stands beside the part of `lead` in an elementwise op."""
    if not isinstance(x, torch.Tensor):
        return x
    if not isinstance(x, DTensor):
        return chunk(x, lead._spec) if x.dim() else x
    if x._spec.placements == lead._spec.placements and x.shape == lead.shape:
        return x._local_tensor
    return chunk(whole(x), lead._spec)


def _each(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    """Elementwise: each rank does its part."""
    if op._schema.name.endswith("_"):
        lead = args[0]
        if not isinstance(lead, DTensor):
            return _plainly(op, args, kwargs, mine, found)
        op(*[fit(x, lead) for x in args], **{k: fit(x, lead) for k, x in kwargs.items()})
        return lead
    lead = _lead(mine, found)
    if lead is None:
        return _plainly(op, args, kwargs, mine, found)
    local = op(*[fit(x, lead) for x in args], **{k: fit(x, lead) for k, x in kwargs.items()})
    made = _wraps(local, lead._spec)
    return return_and_correct_aliasing(op, args, kwargs, made) if op.is_view else made


def _lead(mine: Sequence[DTensor], found: Sequence[torch.Tensor]) -> DTensor | None:
    """Which tensor's cut the result of an elementwise op has; None: it is plain."""
    if len(found) == 1:
        return mine[0]
    shape = torch.broadcast_shapes(*[x.shape for x in found])
    alike = [x for x in mine if x.shape == shape]
    lead = next((x for x in alike if is_cut(x)), None)
    plain = [x for x in found if not isinstance(x, DTensor)]
    if lead is None:
        return alike[0] if alike and not plain and not any(map(is_cut, mine)) else None
    # between replicas a plain tensor that a loss comes from may differ: nothing cuts it
    own = lead._spec.mesh.ndim > 1 and any(x.dim() or x.requires_grad for x in plain)
    return None if own and _graphs() else lead


def _graphs() -> bool:
    """What is made here may be part of a loss, or of its gradient."""
    return torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1


def _plainly(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    """Whole on every rank; what it writes into goes back to where it is stored.

    Of what is nowhere cut, the result is a DTensor too.
    """
    back: dict[int, DTensor] = {}
    cut = any(map(is_cut, mine))
    name = str(op._overloadpacket).removeprefix("aten.")

    def get(x: Any) -> Any:
        if not isinstance(x, DTensor):
            return x
        full = whole(x, name)
        back[id(full)] = x
        return full

    given, named = tree_map(get, (tuple(args), dict(kwargs)))
    out = op(*given, **named)
    for i, a in enumerate(op._schema.arguments):
        if a.alias_info is None or not a.alias_info.is_write:
            continue
        value = given[i] if i < len(given) else named.get(a.name)
        for x in tree_leaves(value):
            if id(x) in back and is_cut(back[id(x)]):
                put(back[id(x)], x)
    alone = not cut and len(mine) == len(found)
    like = mine[0]._spec

    def give(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in back:
            return back[id(x)]
        scalar = x.dim() == 0 and max(y.dim() for y in mine) > 0
        return wrap(x, like, shape=x.shape) if alone and not scalar else x

    if op.is_view and cut and not (args[0].requires_grad and args[0].is_leaf and _graphs()):
        return parts_of(args[0], given[0], out)
    made = tree_map(give, out)
    if op.is_view and alone and isinstance(made, DTensor):
        return return_and_correct_aliasing(op, args, kwargs, made)
    return made


def _lists(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    """Ops on lists: each place by itself."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and tensors([a])]
    writes = op._schema.name.endswith("_")
    leads: list[DTensor | None] = []
    for i in range(len(lists[0])):
        here = [x[i] for x in lists if len(x) == len(lists[0])]
        first = here[0] if isinstance(here[0], DTensor) else None
        stored = [x for x in here if isinstance(x, DTensor)]
        leads.append(first if writes else (_lead(stored, here) if stored else None))
    fused = op._schema.name.startswith("aten::_fused")
    if fused and any(
        lead is not None and not isinstance(x[i], DTensor) and x[i].dim()
        for x in lists
        for i, lead in enumerate(leads)
    ):
        return _plainly(op, args, kwargs, mine, found)

    def local(a: Any) -> Any:
        if any(a is x for x in lists):
            return [whole(x) if k is None else fit(x, k) for x, k in zip(a, leads)]
        return whole(a)

    out = op(*map(local, args), **{k: local(v) for k, v in kwargs.items()})
    if isinstance(out, (list, tuple)):
        return [x if k is None else wrap(x, k._spec) for x, k in zip(out, leads)]
    return out


def _new(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    """Made like another: cut where its shape is the same, else plain."""
    x, size, *rest = args
    if not isinstance(x, DTensor):
        return _plainly(op, args, kwargs, mine, found)
    if tuple(size) != tuple(x.shape):
        return op(x._local_tensor, size, *map(whole, rest), **kwargs)
    if op is aten.new_empty_strided.default:
        op, rest = aten.new_empty.default, []
    return wrap(op(x._local_tensor, x._local_tensor.shape, *rest, **kwargs), x._spec)


def _moved(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    """Dims that change places, and ranges of those that are not cut."""
    x = args[0]
    if len(found) > 1 or not cuts(x._spec):
        return _plainly(op, args, kwargs, mine, found)
    named = {a.name: v for a, v in zip(op._schema.arguments, args)} | kwargs
    to = places(op._schema.name.removeprefix("aten::"), x, named)
    if any(d not in to for _, d in cuts(x._spec)):
        return _plainly(op, args, kwargs, mine, found)
    meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    given = list(args)
    if "size" in named:  # the sizes of this rank
        sizes = list(x._local_tensor.shape)
        given[1] = [*named["size"][: len(named["size"]) - len(sizes)], *sizes]
    shape = op(meta, *args[1:], **kwargs).shape
    local = op(x._local_tensor, *given[1:], **kwargs)
    placements = list(x._spec.placements)
    for k, d in cuts(x._spec):
        placements[k] = type(placements[k])(to[d])  # pyright: ignore
    made = wrap(local, x._spec, placements, shape)
    return return_and_correct_aliasing(op, args, kwargs, made) if op.is_view else made


def _reduce(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    if len(found) == 1 and isinstance(args[0], DTensor) and is_cut(args[0]):
        made = reductions.reduce(op, args, kwargs)
        if made is not None:
            return made
    return _plainly(op, args, kwargs, mine, found)


def _noise(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    with noise.of_first_rank(mine[0]._spec.mesh, kwargs.get("generator")):
        lead = args[0]
        if isinstance(lead, DTensor) and len(found) == 1 and noise.ignores_values(op):
            full = torch.empty(lead.shape, dtype=lead.dtype, device=lead.device)
            made = op(full, *args[1:], **kwargs)
            if op._schema.name.endswith("_"):
                put(lead, full)
                return lead
            return wrap(chunk(made, lead._spec).clone(), lead._spec)
        made = _plainly(op, args, kwargs, mine, found)

    def cut(x: Any) -> Any:
        plain = isinstance(x, torch.Tensor) and not isinstance(x, DTensor)
        if plain and isinstance(lead, DTensor) and x.shape == lead.shape:
            return wrap(chunk(x, lead._spec).clone(), lead._spec)
        return x

    return tree_map(cut, made)


def _scalar(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    return whole(args[0]).item()


def _equal(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    lead = mine[0]
    if found[0].shape != found[1].shape:
        return False
    mine_is = torch.tensor(torch.equal(fit(args[0], lead), fit(args[1], lead)), device=lead.device)
    return bool(parts(mine_is, lead._spec, everyone=True).all())


def _allclose(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    return bool(torch.isclose(*args, **kwargs).all())


def _unscale(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    """Gradients of a GradScaler: what one rank finds infinite, all find."""
    grads, found_inf, scale = args
    op([getattr(g, "_local_tensor", g) for g in grads], found_inf, whole(scale))
    cut = next((g for g in mine if is_cut(g)), None)
    if cut is not None:
        found_inf.copy_(parts(found_inf, cut._spec, everyone=True).amax(0))


def _no_storage(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    x, size, stride = args[:3]
    if (tuple(size), tuple(stride)) == (tuple(x.shape), x.stride()):
        return aten.alias.default(x)
    if x.is_contiguous():
        return _plainly(op, args, kwargs, mine, found)
    raise ShardedParameterError(
        "as_strided of a sharded tensor that is not contiguous: call full_tensor() first"
    )


def _same_size(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    return args[0].shape == args[1].shape


def _pinned(op: Any, args: Any, kwargs: Any, mine: Any, found: Any) -> Any:
    return args[0]._local_tensor.is_pinned()


_OWN: dict[str, Ways] = {
    "_local_scalar_dense": _scalar,
    "equal": _equal,
    "allclose": _allclose,
    "_amp_foreach_non_finite_check_and_unscale_": _unscale,
    "as_strided": _no_storage,
    "is_same_size": _same_size,
    "is_pinned": _pinned,
    "_foreach_norm": lambda op, args, kwargs, mine, found: reductions.norms(op, args, kwargs),
    "_foreach_max": lambda op, args, kwargs, mine, found: [x.max() for x in args[0]],
}
