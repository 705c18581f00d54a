"""The plain call: shard the parameters of the compiled root at its first call and have Dynamo
trace again.

An optimizer made before keeps working, state included; a stale reference to a whole parameter
raises when used.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from tspc.runtime.storage import shard_parameters

from tspc.errors import ShardedParameterError
from tspc.torch_seams import RestartTrace, compiled_roots, real_tensors

_EXCHANGED: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}
_HOOKS: list[Any] = []


class ShardedParameter(nn.Parameter):
    """What a stale reference to a whole parameter turns into."""

    _MESSAGE = (
        "this parameter was sharded by the tsp backend at the first call of the compiled model; "
        "take it from module.parameters() again, or shard first with plan.apply(model, mesh)"
    )

    def __repr__(self) -> str:
        return "ShardedParameter()"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ShardedParameterError(cls._MESSAGE)


def convert(
    module: nn.Module,
    mesh: DeviceMesh,
    axis: str,
    dims: Mapping[int, int | None],
    cut: bool = False,
) -> None:
    """Shard in place, exchange the parameters in live optimizers, free the whole copies."""
    grads = {id(p): p.grad for p in module.parameters() if p.grad is not None}
    exchanged = shard_parameters(module, mesh, axis, dims, cut)
    for old, new in exchanged.items():
        _EXCHANGED[id(old)] = (weakref.ref(old), new)
        grad = grads.get(id(old))
        if grad is not None:
            spec = new._spec
            new.grad = distribute_tensor(grad, spec.mesh, spec.placements)
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(lambda optimizer, a, k: rebind(optimizer)))
    for optimizer in [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]:
        rebind(optimizer)
    for old in exchanged:
        old.grad = None
        old.data = old.data.new_empty(0)
        old.__class__ = ShardedParameter


def rebind(optimizer: Optimizer) -> None:
    """Exchange whole parameters for their shards in an optimizer; its state is sharded alike."""
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            old, new = _EXCHANGED.get(id(p), (None, None))
            if old is None or new is None or old() is not p:
                continue
            group["params"][i] = new
            if p in optimizer.state:
                spec = new._spec
                optimizer.state[new] = {
                    k: distribute_tensor(v, spec.mesh, spec.placements)
                    if isinstance(v, torch.Tensor) and v.shape == new.shape
                    else v
                    for k, v in optimizer.state.pop(p).items()
                }


def convert_and_restart(
    gm: torch.fx.GraphModule,
    mesh: DeviceMesh,
    axis: str,
    dims: Mapping[int, int | None],
    cut: bool,
) -> None:
    """Called inside of the backend for a graph with whole parameters: raises so that Dynamo
    traces again."""
    roots = compiled_roots(gm)
    owned = {id(p) for m in roots for p in m.parameters()}
    left = [n for n, p in real_tensors(gm) if isinstance(p, nn.Parameter) and id(p) not in owned]
    if left:
        raise ShardedParameterError(
            f"{', '.join(left)}: a parameter that no compiled module owns; compile the module "
            "that holds it"
        )
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.inference_mode(False):
        for m in roots:
            if any(not isinstance(p, DTensor) for p in m.parameters()):
                convert(m, mesh, axis, dims, cut)
    raise RestartTrace(restart_reason="tspc sharded the parameters")
