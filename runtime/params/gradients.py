"""Gradients at the edges between plain code and what is stored: a plain tensor's is plain, a
stored parameter's is cut as the parameter is.

What comes plain to a parameter came through plain tensors, which are each replica's own: their
mean is taken.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.hooks import unserializable_hook

from tspc.base.context import Context
from tspc.runtime.comm.failures import naming
from tspc.runtime.params.stored import WHAT, chunk, is_stored, whole, wrap


class _Cut(torch.autograd.Function):
    """A whole gradient -> this rank's part."""

    @staticmethod
    def forward(ctx: Context, g: torch.Tensor, like: DTensor) -> object:
        spec = like._spec
        if spec.mesh.ndim > 1 and not isinstance(g, DTensor):
            g, group = g.clone(memory_format=torch.contiguous_format), spec.mesh.get_group(1)
            with naming(WHAT, group):
                dist.all_reduce(g, group=group)
            g /= spec.mesh.size(1)
        part = chunk(whole(g), spec).clone(memory_format=torch.contiguous_format)
        return wrap(part.to(like.dtype), spec)

    @staticmethod
    def backward(ctx: Context, *gs: object) -> object:
        return whole(gs[0]), None


class _Joined(torch.autograd.Function):
    """A cut gradient -> a plain one."""

    @staticmethod
    def forward(ctx: Context, g: DTensor) -> object:
        ctx.spec = g._spec
        return whole(g).clone()

    @staticmethod
    def backward(ctx: Context, *gs: object) -> object:
        return gs[0]


class ToShard:
    """The first hook of a stored parameter."""

    def __init__(self, p: torch.Tensor):
        self.p = weakref.ref(p)
        self.__torch_unserializable__ = True

    def __call__(self, g: torch.Tensor | None) -> torch.Tensor | None:
        p = self.p()
        if (
            p is None
            or g is None
            or isinstance(g, DTensor)
            and isinstance(p, DTensor)
            and g._spec.placements == p._spec.placements
        ):
            return None
        return _Cut.apply(g, p)


def arrives_cut(p: torch.nn.Parameter) -> None:
    """Whatever gradient comes to a stored parameter, `.grad` is cut as it is."""
    if p.is_meta or not (p.dtype.is_floating_point or p.dtype.is_complex):
        return
    if any(isinstance(h, ToShard) for h in (p._backward_hooks or {}).values()):
        return
    wanted = p.requires_grad
    p.requires_grad_(True).register_hook(ToShard(p))
    p.requires_grad_(wanted)


@unserializable_hook
def _to_plain(g: torch.Tensor | None) -> torch.Tensor | None:
    return _Joined.apply(g) if is_stored(g) else None


def stays_plain(x: torch.Tensor) -> None:
    """The gradient of a plain tensor that met a stored one is plain."""
    if not any(h is _to_plain for h in (x._backward_hooks or {}).values()):
        x.register_hook(_to_plain)
