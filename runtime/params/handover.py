"""What hung on a whole parameter goes over to its shard: its hooks, and the gradients of autograd
graphs that were made from it before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, Shard

from tspc.base.state import CALL, remembered
from tspc.runtime.params.accumulate import is_cut
from tspc.seams.compiler import replace_member, uses
from tspc.seams.tensors import DisableTorchFunctionSubclass

# whole parameters that live autograd graphs read or add to
_READ: list[nn.Parameter] = remembered(CALL, [])


def hand_over(old: nn.Parameter, new: nn.Parameter, axis: str) -> None:
    """The hooks of `old` become those of `new`, their handles too: from now on they are given
    shards (DTensors).

    `old` is emptied as soon as no autograd graph holds it; until then the gradients that one adds
    to it go to `new`.
    """
    if old._backward_hooks:  # the dict that the handles know; what `new` has comes first
        shared, hooks = old._backward_hooks, new._backward_hooks or {}
        old._backward_hooks = OrderedDict(shared)
        first = [*hooks.items(), *shared.items()]
        shared.clear()
        shared.update(first)
        new._backward_hooks = shared
    after = getattr(old, "_post_accumulate_grad_hooks", None)
    if after:
        new._post_accumulate_grad_hooks = after
        replace_member(old, "_post_accumulate_grad_hooks", None)
    if uses(old) == 1:
        _empty(old)
        return

    def moved(p: nn.Parameter) -> None:
        with DisableTorchFunctionSubclass(), torch.no_grad():
            grad, p.grad = p.grad, None
            assert grad is not None
            _add(new, shard_of_gradient(new, grad, axis))
        release()

    old.register_post_accumulate_grad_hook(moved)
    _READ.append(old)


def release() -> None:
    """Free the whole parameters that no autograd graph holds any more."""
    for p in _READ:
        if uses(p) == 1:
            _empty(p)
    _READ[:] = [p for p in _READ if uses(p) > 1]


def _empty(p: nn.Parameter) -> None:
    with DisableTorchFunctionSubclass():
        p.data = p.data.new_empty(0)


def shard_of_gradient(p: nn.Parameter, grad: torch.Tensor, axis: str) -> DTensor:
    """The gradient of a whole parameter that eager code made on all ranks -> that of the shard, its
    mean over the replicas. Collective where there are replicas."""
    assert isinstance(p, DTensor)
    placement = p.placements[0]
    dim = placement.dim if isinstance(placement, Shard) else -1
    size = p.shape[dim] if dim >= 0 else 0
    grad = grad.to_dense() if grad.is_sparse else grad
    storage = (dim, size, is_cut(p), axis, p._local_tensor.shape[max(dim, 0)] if p.dim() else 0)
    return DTensor(
        torch.ops.tspc.whole_weight_backward(grad, *storage), p._spec, requires_grad=False
    )


def _add(p: nn.Parameter, grad: torch.Tensor) -> None:
    p.grad = grad if p.grad is None else p.grad.add_(grad)
    hooks: OrderedDict[int, Callable[[nn.Parameter], None]] = (
        getattr(p, "_post_accumulate_grad_hooks", None) or OrderedDict()
    )
    for hook in list(hooks.values()):
        hook(p)
