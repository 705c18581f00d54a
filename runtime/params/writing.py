"""What would write a shard as if it were the whole: refused, or given the whole.

`writing` is put around the writers of libraries: inside of it `state_dict()` of the models and
optimizers gives whole tensors on the first rank. Outside of it a shard is never pickled.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor, Replicate

from tspc.base.errors import RankFailureError, ShardedParameterError
from tspc.runtime.comm.failures import naming
from tspc.runtime.params.stored import is_stored
from tspc.runtime.params.whole import Gathered, Sharers, State, active, cut, sharers, shown
from tspc.seams.compiler import cut_loaded_states, refuse_pickles
from tspc.seams.tensors import tree_leaves, tree_map

_REFUSED = (
    "a shard {shape} of a model that tspc shards (a parameter, its gradient or what an optimizer "
    "keeps for it) was to be pickled, as torch.save does: the file would hold one rank's part "
    "{part} as if it were the whole. Call tspc.full_state_dict(model) on all ranks, or "
    "tspc.full_state_dict(model, optimizer) for both states, and save that on rank 0; or let each "
    "rank write its part by torch.distributed.checkpoint"
)


def guard() -> None:
    """From now on shards are not pickled, and optimizers of them take whole states."""
    refuse_pickles(_instead)
    cut_loaded_states(loaded)


def _instead(x: DTensor) -> torch.Tensor:
    """What is pickled in the place of a DTensor: the tensor itself where each rank has all of it.
    Raises `ShardedParameterError` for a shard of ours."""
    if not is_stored(x):
        return x
    if not all(isinstance(p, Replicate) for p in x.placements):
        shape, part = list(x.shape), list(x._local_tensor.shape)
        raise ShardedParameterError(_REFUSED.format(shape=shape, part=part))
    local = x._local_tensor.detach()
    if isinstance(x, nn.Parameter):
        return nn.Parameter(local, x.requires_grad)
    return local.requires_grad_(x.requires_grad)


def loaded(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A tensor of a loaded optimizer's state, which is whole on every rank: cut like its
    parameter, or kept whole where it has another shape."""
    if not is_stored(param) or isinstance(value, DTensor) or not value.dim():
        return value
    if value.shape == param.shape:
        return cut(value, param)
    mesh = param.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def written(p: DTensor) -> torch.Tensor:
    """What `state_dict()` gives for a parameter inside of `writing`: whole on the first rank."""
    take = active()
    cached = None if take is None else take.known(p.detach())
    return p.detach() if cached is None else cached


@contextlib.contextmanager
def writing(
    what: str, models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer] = ()
) -> Iterator[bool]:
    """A collective, if there are shards: inside, `state_dict()` of these gives what one device's
    would on the first rank, which alone may write; the others wait for its end.

    -> whether this rank writes. Raises `RankFailureError` on the other ranks if it could not.
    """
    optimizers = [inner(o) for o in optimizers]
    params = [p for m in models for p in m.parameters()]
    params += [p for o in optimizers for g in o.param_groups for p in g["params"]]
    outer = active()
    if outer is not None or not any(is_stored(p) for p in params):
        yield outer is None or outer.among.first
        return
    among = sharers(*params)
    among.meet(what)
    take, handles = Gathered(among), []
    with torch.no_grad(), naming(what, dist.group.WORLD):
        for m in models:
            for x in m.state_dict().values():
                if isinstance(x, DTensor):
                    take(x)
        for o in optimizers:
            state = tree_map(take, o.state_dict())
            if among.first:
                hook = functools.partial(_whole_state, state)
                handles.append(o.register_state_dict_post_hook(hook))
    try:
        with shown(take), settled(what, among):
            yield among.first
    finally:
        for h in handles:
            h.remove()


def _whole_state(whole: State, optimizer: torch.optim.Optimizer, state: State) -> State:
    return state if active() is None else whole


@contextlib.contextmanager
def settled(what: str, among: Sharers) -> Iterator[None]:
    """The others leave after the first rank; an error of it is one on all."""
    error: str | None = None
    try:
        yield
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
        raise
    finally:
        failed = among.given(error)
        if failed is not None and error is None:
            raise RankFailureError(f"{what}: rank {among.ranks[0]} could not write ({failed})")


def gathered(what: str, state: Any) -> tuple[Any, Sharers]:
    """A state that holds shards -> whole on the first rank, None in it on the others; who shares
    it. A collective."""
    shards = [x for x in tree_leaves(state) if is_stored(x)]
    among = sharers(*shards)
    among.meet(what)
    take = Gathered(among)
    with torch.no_grad(), naming(what, dist.group.WORLD):
        whole = tree_map(lambda x: take(x) if is_stored(x) else x, state)
    return whole, among


def inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that a library's wrapper holds."""
    held = getattr(optimizer, "optimizer", None)
    while isinstance(held, torch.optim.Optimizer):
        optimizer, held = held, getattr(held, "optimizer", None)
    return optimizer
