"""The plain call: shard the parameters of the compiled root while its first graph is compiled.

An optimizer made before keeps working, state included; a stale reference to a whole parameter
raises when used.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, MutableMapping, Sequence

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from tspc.base.context import Arguments, Keywords
from tspc.base.errors import ShardedParameterError, UnsupportedError
from tspc.base.state import MODEL, PROCESS, remembered
from tspc.runtime.params.handover import hand_over, release
from tspc.runtime.params.modules import prepare
from tspc.runtime.params.storage import shard_parameters
from tspc.seams.compiler import RestartTrace, compiled_roots, move_shard, real_tensors
from tspc.seams.dynamo import guard_instead
from tspc.seams.tensors import OpOverload, unset_fake_temporarily

_HOOKS: list[object] = remembered(PROCESS, [])
# of shards: no graph has said how these are to be cut
_OPEN: MutableMapping[torch.Tensor, bool] = remembered(MODEL, WeakIdKeyDictionary())


class ShardedParameter(nn.Parameter):
    """What a stale reference to a whole parameter turns into."""

    _MESSAGE = (
        "this parameter was sharded by the tsp backend at the first call of the compiled model; "
        "take it from module.parameters() again, or shard first with plan.apply(model, mesh)"
    )

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return "ShardedParameter()"

    @classmethod
    def __torch_function__(
        cls, func: OpOverload, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        raise ShardedParameterError(cls._MESSAGE)


def convert(
    module: nn.Module,
    mesh: DeviceMesh,
    axis: str,
    dims: Mapping[int, int | None],
    cut: bool = False,
) -> dict[nn.Parameter, nn.Parameter]:
    """Shard in place, exchange the parameters in live optimizers, free the whole copies. -> old to
    new.

    dims: as in `shard_parameters`; others are cut anew by the first graph that takes them.
    """
    optimizers = _optimizers()
    _refuse_sparse(module, optimizers)
    grads = {id(p): p.grad for p in module.parameters() if p.grad is not None}
    exchanged = shard_parameters(module, mesh, axis, dims, cut)
    for old, new in exchanged.items():
        vars(old)["_tspc_shard"] = new  # it lives as long as someone has the old one
        if id(old) not in dims:
            _OPEN[new] = True
        grad = grads.get(id(old))
        if grad is not None:
            assert isinstance(new, DTensor)
            spec = new._spec
            new.grad = distribute_tensor(grad, spec.mesh, spec.placements)
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(lambda optimizer, a, k: rebind(optimizer)))
    for optimizer in optimizers:
        rebind(optimizer)
    for old, new in exchanged.items():
        old.grad = None
        hand_over(old, new, axis)
        old.__class__ = ShardedParameter
    return exchanged


def _refuse_sparse(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    owned = {id(p) for p in module.parameters()}
    for o in optimizers:
        held = (p for group in o.param_groups for p in group["params"])
        if isinstance(o, torch.optim.SparseAdam) and any(id(p) in owned for p in held):
            raise UnsupportedError(
                "SparseAdam takes sparse gradients, and those of a table cut over the ranks are "
                "dense: use torch.optim.Adam, docs/optimizers.md lists others"
            )


def _optimizers() -> list[Optimizer]:
    return [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]


def rebind(optimizer: Optimizer) -> None:
    """Exchange whole parameters for their shards in an optimizer; its state is sharded alike."""
    release()
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            new = getattr(p, "_tspc_shard", None)
            if new is None:
                continue
            group["params"][i] = new
            if p in optimizer.state:
                spec = new._spec
                state = optimizer.state.pop(p)  # a step that calls a closure may hold this dict
                for k, v in state.items():
                    if isinstance(v, torch.Tensor) and v.shape == new.shape:
                        state[k] = distribute_tensor(v, spec.mesh, spec.placements)
                optimizer.state[new] = state


def store(
    gm: torch.fx.GraphModule,
    mesh: DeviceMesh,
    axis: str,
    dims: Mapping[int, int | None],
    cut: bool,
) -> dict[int, nn.Parameter]:
    """Called inside of the backend for a graph with whole parameters. -> id of each -> its shard,
    which Dynamo expects from now on.

    Where modules were not of their classes when Dynamo traced them, it traces again.
    """
    roots = compiled_roots(gm)
    owned = {id(p) for m in roots for p in m.parameters()}
    left = [n for n, p in real_tensors(gm) if isinstance(p, nn.Parameter) and id(p) not in owned]
    if left:
        raise ShardedParameterError(
            f"{', '.join(left)}: a parameter that no compiled module owns; compile the module "
            "that holds it"
        )
    ready, exchanged = prepare(roots), dict[int, nn.Parameter]()
    with unset_fake_temporarily(), torch.inference_mode(False):
        for m in roots:
            if any(not isinstance(p, DTensor) for p in m.parameters()):
                new = convert(m, mesh, axis, dims, cut)
                exchanged.update((id(old), p) for old, p in new.items())
    if not ready:
        raise RestartTrace(restart_reason="tspc sharded the parameters")
    guard_instead(exchanged)
    return exchanged


def settle(wanted: Sequence[tuple[DTensor, Placement]], cut: bool) -> None:
    """Called inside of the backend for a graph that takes these stored parameters: those that no
    graph took before are cut as this one wants them.

    One with a gradient or a state in an optimizer stays as it is. Collective.
    """
    were_open = [_OPEN.pop(p, False) for p, _ in wanted]
    again = [
        (p, placement)
        for (p, placement), was_open in zip(wanted, were_open)
        if was_open and p.grad is None and p.placements[0] != placement
    ]
    states = [o.state for o in _optimizers()] if again else []
    with unset_fake_temporarily(), torch.no_grad():
        for p, placement in again:
            if any(p in s for s in states):
                continue
            chunk = [placement if cut else Replicate()] * (len(p.placements) - 1)
            assert isinstance(p, nn.Parameter)
            plain = p.detach()
            assert isinstance(plain, DTensor)
            move_shard(p, plain.redistribute(placements=[placement, *chunk]))
