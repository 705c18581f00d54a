"""Ops that run along the sequence and read a few rows of other pieces, or one row of all of them.

`sequence_conv` is what a convolution that keeps the length is brought to; `extend` and `carry` are
what a rank asks the others for. `runtime.execute` registers what they do on ranks.
"""

from __future__ import annotations

import torch

from tspc.base.context import Arguments, Context
from tspc.ir.kinds import ALONG
from tspc.ir.layout import Along
from tspc.ops.library import DIM, LIB, local_rows, resized

aten = torch.ops.aten
Tensor = torch.Tensor

LIB.define(
    "sequence_conv(Tensor x, Tensor weight, Tensor? bias, int left, int dilation, int groups) "
    "-> Tensor"
)
# a tile is a chunk of the sequence for one place of `lead`: so many elements that stand together in
# the whole dim and on their rank. Each with more elements before and behind it; way: "zeros" beyond
# the ends of the dim; "wrap": the other end; "mirror": what stands there when the dim is turned
# round, each tile back to front
LIB.define(f"extend(Tensor x, int left, int right, str way, {DIM}) -> Tensor")
LIB.define(f"extend_backward(Tensor g, int left, int right, str way, {DIM}) -> Tensor")
# one element of `dim` per tile -> the sum of those of the tiles before (after: behind) it
LIB.define("carry(Tensor x, int dim, SymInt lead, bool after, str order, str axis) -> Tensor")
# on tiles that overlap by what a window reaches over; a kernel of its own, because Inductor takes a
# length for fixed where it differentiates a convolution
LIB.define(
    "tile_conv(Tensor x, Tensor weight, Tensor? bias, int dilation, int groups, SymInt tiles, "
    "str axis) -> Tensor"
)
LIB.define(
    "tile_conv_backward(Tensor g, Tensor x, Tensor weight, int dilation, int groups, SymInt tiles, "
    "bool[] wanted, str axis) -> Tensor[]"
)


def sequence_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: int, dilation: int, groups: int
) -> Tensor:
    """[B, C, S] -> [B, O, S]: row i reads rows i - left, i - left + dilation, ...; zeros beyond the
    ends. groups 0: one for each channel."""
    reach = dilation * (weight.shape[2] - 1)
    x = torch.nn.functional.pad(x, (left, reach - left))
    return torch.nn.functional.conv1d(x, weight, bias, 1, 0, dilation, groups or x.shape[1])


LIB.impl("sequence_conv", sequence_conv, "CompositeImplicitAutograd")
SEQUENCE_CONV = torch.ops.tspc.sequence_conv.default
ALONG["halo"].add(SEQUENCE_CONV)


@torch.library.register_fake("tspc::extend", lib=LIB)
def _extend_fake(x, left, right, way, *others):
    at = Along(*others)
    return resized(x, at.dim, at.lead * local_rows(at.rows * at.trail + left + right, at.order))


@torch.library.register_fake("tspc::extend_backward", lib=LIB)
def _extend_backward_fake(g, left, right, way, *others):
    at = Along(*others)
    return resized(g, at.dim, at.lead * local_rows(at.rows, at.order) * at.trail)


@torch.library.register_fake("tspc::carry", lib=LIB)
def _carry_fake(x, dim, lead, after, order, axis):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _reach(weight: Tensor, dilation: int) -> int:
    return dilation * (weight.shape[2] - 1)


@torch.library.register_fake("tspc::tile_conv", lib=LIB)
def _tile_conv_fake(x, weight, bias, dilation, groups, tiles, axis):
    rows = x.shape[2] - tiles * _reach(weight, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], rows))


@torch.library.register_fake("tspc::tile_conv_backward", lib=LIB)
def _tile_conv_backward_fake(g, x, weight, *others):
    wanted = others[3]
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return [g.new_empty(s) for s, w in zip(shapes, wanted) if w]


def _tile_conv_keep(ctx: Context, inputs: Arguments, output: object) -> None:
    x, weight, _, *ctx.rest, ctx.axis = inputs
    ctx.save_for_backward(x, weight)


def _tile_conv_grad(ctx: Context, g: Tensor) -> object:
    wanted = list(ctx.needs_input_grad[:3])
    args = (g, *ctx.saved_tensors, *ctx.rest, wanted, ctx.axis)
    gradients = iter(torch.ops.tspc.tile_conv_backward(*args))
    return (*(next(gradients) if w else None for w in wanted), *[None] * 4)


torch.library.register_autograd(
    "tspc::tile_conv", _tile_conv_grad, setup_context=_tile_conv_keep, lib=LIB
)


def _keep(ctx: Context, inputs: Arguments, output: object) -> None:
    ctx.rest = inputs[1:]


def _extend_grad(ctx: Context, g: Tensor) -> object:
    return (torch.ops.tspc.extend_backward(g, *ctx.rest), *(None for _ in ctx.rest))


def _carry_grad(ctx: Context, g: Tensor) -> object:
    dim, lead, after, *geometry = ctx.rest
    return (torch.ops.tspc.carry(g, dim, lead, not after, *geometry), *(None for _ in ctx.rest))


torch.library.register_autograd("tspc::extend", _extend_grad, setup_context=_keep, lib=LIB)
torch.library.register_autograd("tspc::carry", _carry_grad, setup_context=_keep, lib=LIB)
