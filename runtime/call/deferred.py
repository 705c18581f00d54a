"""An output that stays on its ranks until someone reads it: a tensor of the whole shape, gathered
at first use."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from tspc.base.context import Arguments, Context, Keywords
from tspc.base.errors import RankFailureError, UnsupportedError
from tspc.seams.tensors import OpOverload, make_wrapper, tree_map


class DeferredTensor(torch.Tensor):
    """Reading it is a collective: read it on all ranks of the axis.

    Gradients do not flow through it.
    """

    _gather: Callable[[], torch.Tensor] | None
    _value: torch.Tensor | None

    @staticmethod
    def __new__(
        cls,
        gather: Callable[[], torch.Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> DeferredTensor:
        self = make_wrapper(cls, shape, dtype=dtype, device=device)
        self._gather, self._value = gather, None
        return self

    def whole(self) -> torch.Tensor:
        """The gathered tensor."""
        if self._value is None:
            assert self._gather is not None
            try:
                with torch.no_grad():
                    self._value = self._gather()
            except RankFailureError as e:
                raise RankFailureError(
                    f"{_reader()} reads an output of the compiled model that is deferred, "
                    f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}: that is a "
                    'collective; read it on all ranks, or compile with options={"outputs": "full"} '
                    f'or "sharded". {e}'
                ) from e
            self._gather = None
        return self._value

    def __repr__(self, **_: object) -> str:
        return f"DeferredTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: OpOverload, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        if func is torch.ops.aten.detach.default:
            x = args[0]
            return DeferredTensor(x.whole, tuple(x.shape), x.dtype, x.device)

        def unwrap(x: object) -> object:
            return x.whole() if isinstance(x, DeferredTensor) else x

        return func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))


def _reader() -> str:
    """file:line of the caller's own code."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("torch", "tspc"):
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, anchor: torch.Tensor, *args: Any) -> DeferredTensor:
        return DeferredTensor(*args)

    @staticmethod
    def backward(ctx: Context, *gs: object) -> object:
        raise UnsupportedError(
            "an output of the compiled model beside its loss was differentiated; it is "
            "deferred and has no gradient: "
            'compile with options={"outputs": "full"}'
        )


def defer(
    gather: Callable[[], torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """A deferred output; differentiating through it raises `UnsupportedError`."""
    if not dtype.is_floating_point or not torch.is_grad_enabled():
        return DeferredTensor(gather, shape, dtype, device)
    anchor = torch.zeros((), requires_grad=True)
    return _NoGradient.apply(anchor, gather, shape, dtype, device)
