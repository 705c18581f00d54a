"""Gradients over the replicas: averaged at a backward, or under `no_sync` kept until the next one.

What is kept stands in the parameter's `.grad` as a `Kept`: whoever clears `.grad` clears it too,
any other use raises.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from tspc.base.context import Arguments, Keywords
from tspc.base.errors import PendingGradientError, PlanError
from tspc.base.state import CALL, PROCESS, remembered
from tspc.runtime.call.drift import steps_since
from tspc.runtime.call.inputs import replicas_agree, text
from tspc.runtime.comm.place import Place
from tspc.seams.tensors import OpOverload, make_wrapper, no_torch_function, tree_leaves

aten = torch.ops.aten
_QUIET: list[nn.Module] = remembered(CALL, [])
# of parameters whose gradients were kept, in that order
_OPEN: dict[int, weakref.ref[nn.Parameter]] = remembered(CALL, {})
_HOOKS: list[object] = remembered(PROCESS, [])
_MESSAGE = (
    "gradients that tspc.no_sync kept on this rank are not averaged over the replicas yet: run the "
    "last backward of the accumulation outside of it, or drop them by zero_grad()"
)


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """A context for accumulation: backwards inside send no gradients of the model to the other
    replicas; the next one outside averages them together with its own.

    model: the module, or what `torch.compile` made of it. Until then each rank keeps a gradient of
    its chunk of the TSP axis, also where parameters are cut over the replicas too, and `.grad` can
    only be cleared: any other use raises `PendingGradientError`. Without replicas nothing changes.
    Raises `PlanError` for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f"no_sync takes a module, compiled or not, and was given {type(model)}")
    _QUIET.append(model)
    try:
        yield
    finally:
        _QUIET.remove(model)


class Kept(torch.Tensor):
    """In `.grad`: `total`, the sum of this rank's gradients of its chunk, and what was `before`."""

    __torch_function__ = no_torch_function  # type: ignore[assignment]

    place: Place
    total: torch.Tensor
    before: torch.Tensor | None
    owner: weakref.ref[nn.Parameter]

    @staticmethod
    def __new__(cls, place: Place, p: nn.Parameter, total: torch.Tensor) -> Kept:
        like = {"strides": p.stride(), "dtype": p.dtype, "device": p.device}
        return make_wrapper(cls, p.shape, **like)

    def __init__(self, place: Place, p: nn.Parameter, total: torch.Tensor):
        self.place, self.total, self.before, self.owner = place, total, p.grad, weakref.ref(p)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return "Kept()"

    def clear(self) -> None:
        """Zeros in its place."""
        p = self.owner()
        if p is not None:
            p.grad = torch.zeros_like(p) if self.before is None else self.before.zero_()

    @classmethod
    def __torch_dispatch__(
        cls, func: OpOverload, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        """Cleared, or added to by code outside of the compiled graphs, whose gradients are means
        already; nothing else."""
        if func in (aten.zero_.default, aten._foreach_zero_.default):
            for x in tree_leaves(args):
                x.clear() if isinstance(x, Kept) else x.zero_()
            return args[0] if func is aten.zero_.default else None
        if func is aten.add_.Tensor and isinstance(args[0], Kept):
            kept, g = args
            kept.before = g.clone() if kept.before is None else kept.before + g
            return kept
        raise PendingGradientError(_MESSAGE)


def is_cut(p: DTensor) -> bool:
    """Its chunk is cut over the replicas too."""
    return len(p.placements) > 1 and p.placements[1].is_shard()


def reduced(
    place: Place,
    params: Sequence[Any],
    names: Sequence[str],
    grads: Sequence[torch.Tensor | None],
    reduce: torch.dtype | None,
) -> list[DTensor | None]:
    """Gradients of this rank's chunks -> their means as the parameters are stored; collective.

    None for those of a model under `no_sync`, which are kept. Raises `RankMismatchError` if the
    replicas have gradients of other parameters.
    """
    quiet = {id(p) for m in _QUIET for p in m.parameters()} if place.replicas else set()
    params, grads = list(params), list(grads)
    count = len(params)
    for i, (p, g) in enumerate(zip(params, grads)):
        if id(p) in quiet:
            if g is not None:
                _keep(place, p, g)
            grads[i] = None
        elif (kept := _taken(p)) is not None:
            grads[i] = kept if g is None else g + kept
    if any(id(p) not in quiet for p in params):
        for p in _left(place, quiet):  # this backward does not reach them
            params.append(p)
            grads.append(_taken(p))
    if place.replicas is not None:
        named = [*names, *(f"kept {i}" for i in range(count, len(params)))]
        present = {n: text(g.dtype, g.shape) for n, g in zip(named, grads) if g is not None}
        present["all, after this many optimizer steps"] = steps_since(params)
        replicas_agree(place, present, "has gradients of")
    dims = [p.placements[0].dim if is_cut(p) else None for p in params]
    out = [
        None if g is None else DTensor(g, p._spec, requires_grad=False)
        for p, g in zip(params, place.mean(grads, dims, reduce))
    ]
    for p, g in zip(params[count:], out[count:]):
        p.grad = g if p.grad is None else p.grad + g
    return out[:count]


def _keep(place: Place, p: nn.Parameter, g: torch.Tensor) -> None:
    if isinstance(p.grad, Kept):
        p.grad.total = p.grad.total + g
        return
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_refuse))
    p.grad = Kept(place, p, g)
    key = id(p)
    _OPEN[key] = weakref.ref(p, lambda _: _OPEN.pop(key, None))


def _taken(p: nn.Parameter) -> torch.Tensor | None:
    """What was kept; `.grad` is then what it was before."""
    kept = p.grad if id(p) in _OPEN else None
    if not isinstance(kept, Kept):
        return None
    del _OPEN[id(p)]
    p.grad = kept.before
    return kept.total


def _left(place: Place, quiet: set[int]) -> list[nn.Parameter]:
    """The parameters of other graphs whose gradients are kept."""
    open_params = [(key, ref()) for key, ref in _OPEN.items() if key not in quiet]
    for key, p in open_params:
        if p is None or not isinstance(p.grad, Kept):
            del _OPEN[key]
    return [
        p
        for _, p in open_params
        if p is not None and isinstance(p.grad, Kept) and p.grad.place is place
    ]


def _refuse(optimizer: Optimizer, args: object, kwargs: object) -> None:
    owned = (p for group in optimizer.param_groups for p in group["params"] if id(p) in _OPEN)
    if any(isinstance(p.grad, Kept) for p in owned):
        raise PendingGradientError(f"{type(optimizer).__name__}.step(): {_MESSAGE}")
