"""Persistent parameters: a DTensor each under its own name, read whole only while tracing or
inside a compiled root.

`shard_parameters` exchanges a module's parameters in place; the module's class becomes one whose
properties read them. `Prologue` turns what is stored into the equal shards that the folds take,
and gradients back. Stored are torch's chunks over the TSP axis, and then over the replicas, where
there are some: whole chunks or, with `cut`, parts of them. See docs/design.md, "Parameters".
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tspc.base.context import Context
from tspc.base.errors import ShardedParameterError, UnsupportedError
from tspc.base.state import CALL, MODEL, remembered
from tspc.ir.shard import ShardMap
from tspc.runtime.call import frames as calls
from tspc.runtime.call.finite import check_gradients
from tspc.runtime.call.twice import refused
from tspc.runtime.comm.drivers import distributed
from tspc.runtime.comm.failures import naming
from tspc.runtime.comm.place import PLACES, Place, chunk_rows
from tspc.runtime.comm.repack import fits, repack, repack_backward
from tspc.runtime.params import libraries, writing
from tspc.runtime.params.accumulate import is_cut, reduced
from tspc.runtime.params.gradients import arrives_cut
from tspc.runtime.params.stored import dim_of, is_stored
from tspc.runtime.params.values import store_on
from tspc.seams.compiler import (
    assign_data_of_shards,
    find_nan_in_shards,
    move_shard,
    orthogonalise_whole,
    outside_of_dynamo,
    skip_code,
)

EXCHANGE = "the exchange of stored weights for the shards of the folds"
_STATE = remembered(CALL, threading.local())
Kind = tuple[type[nn.Module], tuple[str, ...], str]  # a class, names of shards, the axis
# a class dies with its last module
_CLASSES: weakref.WeakValueDictionary[Kind, type] = remembered(MODEL, weakref.WeakValueDictionary())


class _Sharded(nn.Module):
    """What a module with shards has, besides what its own class says."""

    _tspc_class: ClassVar[type[nn.Module]]  # its own
    _tspc_names: ClassVar[tuple[str, ...]]  # of the parameters that are shards
    _tspc_axis: ClassVar[str]


def _reading() -> bool:
    return torch.compiler.is_compiling() or getattr(_STATE, "depth", 0) > 0


def _whole(p: DTensor, axis: str) -> torch.Tensor:
    placement, local = p.placements[0], p.to_local()
    if isinstance(placement, Replicate):
        return torch.ops.tspc.whole_weight(local, -1, 0, False, axis)
    dim = dim_of(placement)
    return torch.ops.tspc.whole_weight(local, dim, p.shape[dim], is_cut(p), axis)


_gathered = outside_of_dynamo(_whole)


def _reader(name: str, axis: str) -> Callable[[nn.Module], torch.Tensor | None]:
    def get(self: nn.Module) -> torch.Tensor | None:
        p = self._parameters[name]
        if not isinstance(p, DTensor) or not _reading():
            return p
        if torch.compiler.is_compiling():
            return _whole(p, axis)
        calls.used(self, name, p)
        return _gathered(p, axis)

    return get


def _property(name: str, axis: str) -> property:
    def put(self: nn.Module, value: torch.Tensor | nn.Module) -> None:
        nn.Module.__setattr__(self, name, value)

    return property(_reader(name, axis), put)


def _call(self: nn.Module, *args: object, **kwargs: object) -> object:
    if torch.compiler.is_compiling():
        return nn.Module.__call__(self, *args, **kwargs)
    _STATE.depth = getattr(_STATE, "depth", 0) + 1
    call = calls.eager(self)
    try:
        return nn.Module.__call__(self, *args, **kwargs)
    finally:
        _STATE.depth -= 1
        if call is not None:
            calls.leave(call)
            calls.tell(call)


# Dynamo takes these into a graph where their caller is traced; where the caller is left to Python
# they are too: a graph of its own would have no depth, or nothing but a weight.
for read in (_call, _reading, _reader("", "")):
    skip_code(read.__code__)


def _reduce(self: _Sharded, protocol: object) -> object:
    cls = type(self)
    return _rebuild, (cls._tspc_class, cls._tspc_names, cls._tspc_axis, self.__dict__)


def _save(self: _Sharded, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
    """Whole tensors while a library writes them."""
    type(self)._tspc_class._save_to_state_dict(self, destination, prefix, keep_vars)
    libraries.adapt()
    for n, p in self._parameters.items():
        if isinstance(p, DTensor) and prefix + n in destination and writing.active():
            destination[prefix + n] = writing.written(p)


def _load(self: _Sharded, state: Mapping[str, object], prefix: str, *args: object) -> None:
    """A whole tensor in a state is cut like the parameter; every rank has the same one."""
    state = dict(state)
    for n, p in self._parameters.items():
        x = state.get(prefix + n)
        if isinstance(p, DTensor) and isinstance(x, torch.Tensor) and not isinstance(x, DTensor):
            x = x.to(p.device_mesh.device_type)
            state[prefix + n] = distribute_tensor(
                x, p.device_mesh, p.placements, src_data_rank=None
            )
    type(self)._tspc_class._load_from_state_dict(self, state, prefix, *args)


def _apply(
    self: _Sharded, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    """`.to()` and its kind keep every parameter the object that optimizers know."""
    shards = {n: p for n, p in self._parameters.items() if isinstance(p, DTensor)}
    self._parameters.update(dict.fromkeys(shards))
    try:
        type(self)._tspc_class._apply(self, fn, recurse)
    finally:
        self._parameters.update(shards)
    with torch.no_grad():
        for n, p in shards.items():
            grad = None if p.grad is None else fn(p.grad)
            p.grad = None
            moved = fn(p)
            kept = p if moved is p else move_shard(p, moved.detach())
            arrives_cut(kept)
            kept.grad = kept.grad if grad is None else grad
            self._parameters[n] = kept
    return self


def _rebuild(
    cls: type[nn.Module], names: tuple[str, ...], axis: str, state: dict[str, object]
) -> nn.Module:
    module = cls.__new__(cls)
    module.__dict__.update(state)
    module.__class__ = _sharded_class(cls, names, axis)
    for p in module._parameters.values():
        if isinstance(p, DTensor):
            p.grad = None  # as a copied nn.Parameter
            arrives_cut(p)
    return module


def _sharded_class(cls: type[nn.Module], names: tuple[str, ...], axis: str) -> type:
    key = (cls, names, axis)
    sharded = _CLASSES.get(key)
    if sharded is None:
        body: dict[str, object] = {n: _property(n, axis) for n in names}
        body.update(
            _tspc_class=cls,
            _tspc_names=names,
            _tspc_axis=axis,
            __module__=cls.__module__,
            __qualname__=cls.__qualname__,
            __call__=_call,
            __reduce_ex__=_reduce,
            _save_to_state_dict=_save,
            _load_from_state_dict=_load,
            _apply=_apply,
        )
        sharded = _CLASSES[key] = type(cls.__name__, (cls,), body)
    return sharded


def shard_parameters(
    module: nn.Module,
    mesh: DeviceMesh,
    axis: str,
    dims: Mapping[int, int | None],
    cut: bool = False,
) -> dict[nn.Parameter, nn.Parameter]:
    """Every parameter becomes a DTensor, by rank 0's values (of the first replica); buffers too
    come from rank 0.

    -> old to new. dims: id of a parameter -> the dim to cut, None to replicate; others are cut
    along their largest dim. cut: over the replicas too, as those that are stored so already.
    """
    cut = cut or any(is_cut(p) for p in module.parameters() if isinstance(p, DTensor))
    assign_data_of_shards(is_stored, ShardedParameterError)
    find_nan_in_shards()
    orthogonalise_whole(is_stored)
    store_on(mesh)
    writing.guard()
    libraries.adapt(module)
    group = mesh.get_group(0)
    source = dist.get_process_group_ranks(group)[0]
    by_id: dict[int, nn.Parameter] = {}
    exchanged: dict[nn.Parameter, nn.Parameter] = {}
    with torch.no_grad(), naming("the sharding of the parameters", group):
        for m in module.modules():
            names = tuple(n for n, p in m._parameters.items() if p is not None)
            for n in names:
                p = m._parameters[n]
                assert p is not None
                if isinstance(p, DTensor):
                    continue
                if id(p) not in by_id:
                    dim = dims[id(p)] if id(p) in dims else default_dim(p)
                    chunk = Replicate() if dim is None else Shard(dim)
                    placements = [chunk, chunk if cut else Replicate()][: mesh.ndim]
                    rank = None if p.is_meta else 0
                    data = distribute_tensor(p.data, mesh, placements, src_data_rank=rank)
                    by_id[id(p)] = nn.Parameter(data, requires_grad=p.requires_grad)
                    arrives_cut(by_id[id(p)])
                    exchanged[p] = by_id[id(p)]
                m._parameters[n] = by_id[id(p)]
            if names and not hasattr(type(m), "_tspc_class"):
                m.__class__ = _sharded_class(type(m), names, axis)
        for b in (b for b in module.buffers() if not b.is_meta):
            b.copy_(PLACES[axis].from_first_replica(b))
            dist.broadcast(b, source, group=group)
    return exchanged


def default_dim(p: torch.Tensor) -> int | None:
    """The largest dim; parameters of one dim below 64 KiB are replicated."""
    if p.dim() == 0 or (p.dim() == 1 and p.numel() * p.element_size() < 64 * 1024):
        return None
    return max(range(p.dim()), key=lambda k: p.shape[k])


def placed(m: ShardMap | None) -> Placement:
    """How a parameter is stored for a shard map."""
    return Replicate() if m is None else Shard(m.dim)


def _exchanged(
    x: torch.Tensor, p: DTensor, placement: Placement, wanted: Placement, mesh: DeviceMesh
) -> torch.Tensor:
    """Collective, unless the chunk is cut as wanted already."""
    if placement == wanted:
        return x
    facts = {"run_check": False, "shape": p.shape, "stride": p.stride()}
    chunk = DTensor.from_local(x, mesh, [placement], **facts)
    return chunk.redistribute(placements=[wanted]).to_local()


def _chunks(place: Place, params: Sequence[DTensor]) -> list[torch.Tensor]:
    """This rank's chunks, whole: gathered over the replicas where they are cut."""
    out = [p._local_tensor for p in params]
    cut = [i for i, p in enumerate(params) if is_cut(p)]
    dims = [dim_of(params[i].placements[0]) for i in cut]
    sizes = [chunk_rows(place.axis, params[i].shape[d]) for i, d in zip(cut, dims)]
    for i, x in zip(cut, place.gather([out[i] for i in cut], dims, sizes)):
        out[i] = x
    return out


@dataclass(frozen=True)
class Taken:
    """How one graph takes its sharded parameters.

    names: of the parameters. reduce: the type in which gradients add up. check: their gradients
    are to be finite (`check_nan`). due: the names of those that must have one. program: what they
    are taken for.
    """

    place: Place
    names: Sequence[str]
    maps: Sequence[ShardMap | None]
    reduce: torch.dtype | None = None
    check: bool = False
    due: frozenset[str] = frozenset()
    program: object = None  # a backward that outlives the model still finds the bodies of its folds

    @cached_property
    def wanted(self) -> list[Placement]:
        """How each is stored where nothing has to be exchanged."""
        return [placed(m) for m in self.maps]


class Prologue(torch.autograd.Function):
    """What is stored of all parameters -> the tensors that one rank's program takes; gradients go
    back as DTensors, their means over the replicas.

    A parameter stored otherwise than the program's map wants is exchanged, either way.
    """

    @staticmethod
    def forward(ctx: Context, taken: Taken, *params: DTensor) -> object:
        place = taken.place
        ctx.rest, ctx.shapes, outs = (taken, params), [], []
        ctx.set_materialize_grads(False)
        chunks = _chunks(place, params)
        for p, m, wanted, x in zip(params, taken.maps, taken.wanted, chunks):
            spec = p._spec
            x = _exchanged(x, p, spec.placements[0], wanted, place.mesh)
            ctx.shapes.append(x.shape)
            if m is None or fits(m, x.shape, spec.shape):
                outs.append(x.view_as(x))
            else:
                steps = repack(place.axis, m, x, spec.shape[m.dim])
                outs.append(distributed(steps, place.axis, place.groups, EXCHANGE))
        return tuple(outs)

    @staticmethod
    @outside_of_dynamo
    def backward(ctx: Context, *grads: torch.Tensor) -> object:
        with torch.no_grad():
            out = Prologue.returned(ctx, grads)
        return (None, *refused(out))

    @staticmethod
    def returned(ctx: Context, grads: Sequence[torch.Tensor | None]) -> list[DTensor | None]:
        """Gradients of what a program took -> those of what is stored."""
        taken, params = ctx.rest
        place, chunks = taken.place, []
        lost = [n for n, g in zip(taken.names, grads) if g is None and n in taken.due]
        if lost:
            raise UnsupportedError(
                f"{', '.join(lost)}: has a gradient on one device, none in the compiled program, "
                "an error of tspc; take what computes with it out by torch._dynamo.disable"
            )
        for g, m, p, wanted, shape in zip(grads, taken.maps, params, taken.wanted, ctx.shapes):
            spec = p._spec
            if g is not None:
                if m is not None and not fits(m, shape, spec.shape):
                    steps = repack_backward(place.axis, m, g, spec.shape[m.dim], shape[m.dim])
                    g = distributed(steps, place.axis, place.groups, EXCHANGE)
                g = _exchanged(g, p, wanted, spec.placements[0], place.mesh)
            chunks.append(g)
        out = reduced(place, params, taken.names, chunks, taken.reduce)
        if taken.check:
            local_grads = [
                (n, None if g is None else g._local_tensor) for n, g in zip(taken.names, out)
            ]
            check_gradients(
                place, local_grads, [(n, p._local_tensor) for n, p in zip(taken.names, params)]
            )
        return out
