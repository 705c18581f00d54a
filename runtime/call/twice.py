"""Derivatives of gradients (`create_graph=True`): the compiled backward has none, so whoever takes
them is told."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tspc.base.context import Context
from tspc.base.errors import UnsupportedError
from tspc.seams.compiler import outside_of_dynamo

MESSAGE = (
    "a gradient of a model that is compiled for more than one rank was differentiated again "
    "(create_graph=True): its backward has no derivative. Do this: call the uncompiled module "
    "for that loss, or write the penalty without gradients (finite differences)"
)


class Refused(torch.autograd.Function):
    """Gradients as they are; a backward through them is an error.

    anchor: wants a gradient, so that they do.
    """

    @staticmethod
    def forward(ctx: Context, anchor: torch.Tensor, *grads: torch.Tensor) -> object:
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Context, *cotangents: object) -> object:
        raise UnsupportedError(MESSAGE)


def refused(grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Gradients of a backward that is itself recorded; else as they are."""
    if not torch.is_grad_enabled() or all(g is None for g in grads):
        return list(grads)
    anchor = torch.zeros((), requires_grad=True)
    grad_outputs = iter(Refused.apply(anchor, *(g.detach() for g in grads if g is not None)))
    return [None if g is None else next(grad_outputs) for g in grads]


class Inputs(torch.autograd.Function):
    """Inputs that want gradients, as they are."""

    @staticmethod
    def forward(ctx: Context, *inputs: torch.Tensor) -> object:
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    @outside_of_dynamo
    def backward(ctx: Context, *grads: torch.Tensor) -> object:
        return tuple(refused(grads))


def watched(values: Sequence[object], plain: Sequence[int]) -> list[object]:
    """What a graph is given; plain: the positions of what is no parameter."""
    out = list(values)
    wanted = {i: x for i in plain if isinstance(x := out[i], torch.Tensor) and x.requires_grad}
    if wanted and torch.is_grad_enabled():
        for i, x in zip(wanted, Inputs.apply(*wanted.values())):
            out[i] = x
    return out
