"""Modules whose parameters may be shards: their classes read them whole inside of a compiled root,
and save, load, move and copy them; Dynamo traces a whole parameter in the place of a shard."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from types import CodeType
from typing import ClassVar

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils.weak import WeakIdKeyDictionary

from tspc.base.state import CALL, MODEL, remembered
from tspc.runtime.call import frames as calls
from tspc.runtime.params import libraries, writing
from tspc.runtime.params.accumulate import is_cut
from tspc.runtime.params.gradients import arrives_cut
from tspc.runtime.params.stored import dim_of, is_stored
from tspc.seams.compiler import move_shard, outside_of_dynamo, skip_code
from tspc.seams.dynamo import leave_to_python

_STATE = remembered(CALL, threading.local())
# shard -> the whole parameter that is traced in its place
_WHOLE: MutableMapping[torch.Tensor, nn.Parameter] = remembered(MODEL, WeakIdKeyDictionary())
Kind = tuple[type[nn.Module], tuple[str, ...]]  # a class, names of its parameters
# a class dies with its last module
_CLASSES: weakref.WeakValueDictionary[Kind, type] = remembered(MODEL, weakref.WeakValueDictionary())


class _Sharded(nn.Module):
    """What a module with shards has, besides what its own class says."""

    _tspc_class: ClassVar[type[nn.Module]]  # its own
    _tspc_names: ClassVar[tuple[str, ...]]  # of the parameters that are shards, or may become some
    _tspc_axis: str  # once there are shards


def _reading() -> bool:
    return torch.compiler.is_compiling() or getattr(_STATE, "depth", 0) > 0


def _whole(p: DTensor, axis: str) -> torch.Tensor:
    placement, local = p.placements[0], p.to_local()
    if isinstance(placement, Replicate):
        return torch.ops.tspc.whole_weight(local, -1, 0, False, axis)
    dim = dim_of(placement)
    return torch.ops.tspc.whole_weight(local, dim, p.shape[dim], is_cut(p), axis)


_gathered = outside_of_dynamo(_whole)


def _reader(name: str) -> Callable[[_Sharded], torch.Tensor | None]:
    def get(self: _Sharded) -> torch.Tensor | None:
        p = self._parameters[name]
        if not isinstance(p, DTensor) or not _reading():
            return p
        if torch.compiler.is_compiling():
            return _whole(p, self._tspc_axis)
        calls.used(self, name, p)
        return _gathered(p, self._tspc_axis)

    return get


def _property(name: str) -> property:
    def put(self: nn.Module, value: torch.Tensor | nn.Module) -> None:
        nn.Module.__setattr__(self, name, value)

    return property(_reader(name), put)


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


def in_trace(
    p: torch.Tensor, functions: Iterable[CodeType]
) -> AbstractContextManager[nn.Parameter] | None:
    """A whole parameter, without values, that Dynamo is to trace in the place of a shard inside of
    a module's call."""
    if "_tspc_gradient" in vars(p):
        leave_to_python("the gradient of a sharded parameter is read")
    if not (isinstance(p, nn.Parameter) and is_stored(p)):
        return None
    inside = getattr(_STATE, "depth", 0) > 0 or calls.of_module() or _call.__code__ in functions
    return _as_whole(p) if inside else None


@contextlib.contextmanager
def _as_whole(p: DTensor) -> Iterator[nn.Parameter]:
    kept, kind = _WHOLE.get(p), (p.shape, p.dtype, p.device, p.requires_grad)
    with torch.inference_mode(False):  # a trace under it is not the last one
        if kept is None or (kept.shape, kept.dtype, kept.device, kept.requires_grad) != kind:
            empty = torch.empty(p.shape, dtype=p.dtype, device=p.device)
            kept = _WHOLE[p] = nn.Parameter(empty, p.requires_grad)
            vars(kept)["_tspc_of"] = weakref.ref(p)
        held: list[torch.Tensor] = [kept]
        if p.grad is None:
            kept.grad = None
        else:  # Dynamo looks for one, and may come upon code that reads it
            kept.grad = torch.empty_like(kept, requires_grad=False)
            vars(kept.grad)["_tspc_gradient"] = True
            held.append(kept.grad)
    for x in held:
        x.untyped_storage().resize_(x.numel() * x.element_size())
    try:
        yield kept
    finally:
        for x in held:
            x.untyped_storage().resize_(0)


def shard_of(x: object) -> object:
    """What a traced parameter stands for; anything else as it is."""
    stored = vars(x).get("_tspc_of") if isinstance(x, nn.Parameter) else None
    return x if stored is None else stored()


# Dynamo takes these into a graph where their caller is traced; where the caller is left to Python
# they are too: a graph of its own would have no depth, or nothing but a weight.
for read in (_call, _reading, _reader("")):
    skip_code(read.__code__)


def _reduce(self: _Sharded, protocol: object) -> object:
    cls = type(self)
    return _rebuild, (cls._tspc_class, cls._tspc_names, self.__dict__)


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


def _rebuild(cls: type[nn.Module], names: tuple[str, ...], state: dict[str, object]) -> nn.Module:
    module = cls.__new__(cls)
    module.__dict__.update(state)
    module.__class__ = _sharded_class(cls, names)
    for p in module._parameters.values():
        if isinstance(p, DTensor):
            p.grad = None  # as a copied nn.Parameter
            arrives_cut(p)
    return module


def _sharded_class(cls: type[nn.Module], names: tuple[str, ...]) -> type:
    key = (cls, names)
    sharded = _CLASSES.get(key)
    if sharded is None:
        body: dict[str, object] = {n: _property(n) for n in names}
        body.update(
            _tspc_class=cls,
            _tspc_names=names,
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


def prepare(modules: Iterable[nn.Module]) -> bool:
    """They become of classes that read parameters, whole ones as well as shards. -> whether all of
    them were already."""
    ready = True
    for m in (m for root in modules for m in root.modules()):
        names = tuple(n for n, p in m._parameters.items() if p is not None)
        if not set(names) <= set(getattr(type(m), "_tspc_names", ())):
            cls = getattr(type(m), "_tspc_class", type(m))
            m.__class__, ready = _sharded_class(cls, names), False
    return ready
