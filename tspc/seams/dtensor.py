"""Private APIs of torch's DTensor: who is asked what an op on DTensors does, and what reads their
memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import _are_we_tracing
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._op_schema import OpInfo, OutputSharding
from torch.utils._python_dispatch import return_and_correct_aliasing

from tspc.seams.compiler import replace_member

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


def dispatch_dtensors(handle: Callable[..., object]) -> None:
    """Every aten op on DTensors goes to handle(instead, op, args, kwargs); `instead` is what torch
    does with it.

    torch looks up a handler of each op before anything else. What it has none for, an op of a
    library, comes where torch asks how the result is cut.
    """
    dispatcher = DTensor._op_dispatcher
    propagate: Any = dispatcher._propagate_op_sharding_dispatch_slow_path
    as_torch = functools.partial(_as_torch, propagate)
    before, handlers = dispatcher._custom_op_handlers, {}
    for op in _aten_ops():
        if not op._schema.overload_name.endswith("out"):
            handlers[op] = functools.partial(handle, before.get(op, as_torch))
    dispatcher._custom_op_handlers = {**before, **handlers}

    def ask(
        op: OpOverload, args: Arguments, kwargs: Keywords, info: OpInfo, cached: bool
    ) -> object:
        return handle(lambda *_: propagate(op, args, kwargs, info, cached), op, args, kwargs)

    replace_member(dispatcher, "_propagate_op_sharding_dispatch_slow_path", ask)
    torch._C._clear_DTensor_sharding_propagator_cache()


def _aten_ops() -> list[OpOverload]:
    names = [n[6:] for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")]
    ops = []
    for packet, _, overload in (n.partition(".") for n in names):
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if any("Tensor" in str(a.type) for a in op._schema.arguments):
            ops.append(op)
    return ops


def _as_torch(
    propagate: Callable[..., object], op: OpOverload, args: Arguments, kwargs: Keywords
) -> object:
    """DTensor's own way with an op, spelled in Python."""
    dispatcher: Any = DTensor._op_dispatcher
    info = dispatcher.unwrap_to_op_info(op, args, kwargs)
    sharding = propagate(op, args, kwargs, info, True)
    if not isinstance(sharding, OutputSharding):
        return sharding
    info.output_sharding = sharding
    here = info.compute_mesh.get_coordinate() is not None
    local = dispatcher._dispatch_get_local_results_slow_path(op, args, info)
    inplace = op._schema.name.endswith("_")
    out = not inplace and "out" in op._schema.overload_name
    if inplace or out or (sharding.output_spec is None and op is torch.ops.aten.equal.default):
        state = (info.compute_mesh, sharding, local, here, inplace, out)
        return dispatcher._dispatch_fast_path_python_tail(op, args, kwargs, *state)
    wrapped = dispatcher.wrap(local, sharding.output_spec)
    if here and op._schema._is_view_op():
        return return_and_correct_aliasing(op, args, kwargs, wrapped)
    return wrapped


def is_traced(x: DTensor) -> bool:
    """It stands for a tensor while a compiler traces, or has no values."""
    local = x._local_tensor
    if type(local) is torch.Tensor:
        return local.is_meta
    return local.is_meta or isinstance(local, FakeTensor) or _are_we_tracing()


def read_dtensors(
    chosen: Callable[[DTensor], bool], whole: Callable[[DTensor], torch.Tensor]
) -> None:
    """What reads the memory of a tensor in C++ reads the whole of those that are chosen."""

    def reads(name: str) -> Callable[..., object]:
        plain = getattr(torch.Tensor, name)

        def read(self: DTensor, *args: Any, **kwargs: object) -> object:
            if not chosen(self):
                return plain(self, *args, **kwargs)
            if name == "__format__":
                return format(self.item() if self.dim() == 0 else str(self), *args)
            x = whole(self).detach().requires_grad_(self.requires_grad)
            return getattr(x, name)(*args, **kwargs)

        return read

    for name in ("numpy", "tolist", "__format__"):
        setattr(DTensor, name, reads(name))
