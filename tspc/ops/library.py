"""Schemas, fakes and autograd formulas of tspc's ops.

`runtime.execute` registers what they do on ranks. A sequence dim is told by (dim, lead, trail):
the dim is lead * S * trail, S the sequence. `rows` is c of the layout, `length` is S, `order` the
layout's order, `axis` the name of the TSP axis. No op takes a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from tspc.base.context import Arguments, Context
from tspc.ir.body import BODIES, Body, evaluate, symbol_values
from tspc.ir.layout import Along
from tspc.ir.spec import FIELDS, OPERANDS

LIB = torch.library.Library("tspc", "FRAGMENT")

DIM = "int dim, SymInt lead, SymInt trail, SymInt rows, SymInt length, str order, str axis"
FOLD = (
    "Tensor[] tokens, Tensor[] invariants, Tensor[] shards, SymInt[] sizes, SymInt[] rows, "
    "SymInt[] lengths, str region, str key, str axis"
)

# logits[..., labels] of the last dim, zero where a label lies outside [offset, offset + width)
LIB.define("pick(Tensor logits, Tensor labels, Tensor? offset=None) -> Tensor")
# an index that floats of the model make, as it is; raises where one is not in [0, size)
LIB.define("in_range(Tensor index, SymInt size, str where) -> Tensor")
# a stored shard (torch's chunk of `dim`, -1: all of it; cut: its chunk over the replicas) -> the
# whole weight; stands in a traced model where it reads a parameter
LIB.define("whole_weight(Tensor local, int dim, int size, bool cut, str axis) -> Tensor")
LIB.define(
    "whole_weight_backward(Tensor g, int dim, int size, bool cut, str axis, SymInt rows) -> Tensor"
)
LIB.define(f"whole(Tensor x, {DIM}) -> Tensor")
LIB.define(f"whole_backward(Tensor g, {DIM}) -> Tensor")
LIB.define(f"local(Tensor x, {DIM}) -> Tensor")
LIB.define(f"local_backward(Tensor g, {DIM}) -> Tensor")
LIB.define(f"clear_pads(Tensor x, {DIM}) -> Tensor")
LIB.define("all_reduce(Tensor x, str axis) -> Tensor")
# reduce: the type in which gradients add up over the ranks; None: fp32, or theirs where it is wider
LIB.define("vary(Tensor[] xs, ScalarType? reduce, str axis) -> Tensor[]")
LIB.define("vary_backward(Tensor[] gs, ScalarType? reduce, str axis) -> Tensor[]")
# dtype: what travels, the shard cast to it; the gradient is of the shard's own type
LIB.define(
    "gather_weight(Tensor shard, int dim, int size, bool partial, ScalarType dtype, "
    "ScalarType? reduce, str axis) -> Tensor"
)
LIB.define(
    "gather_weight_backward(Tensor g, int dim, int units, bool partial, ScalarType dtype, "
    "ScalarType? reduce, str axis) -> Tensor"
)
LIB.define(
    "embed(Tensor shard, Tensor ids, int padding, bool scaled, ScalarType dtype, SymInt rows, "
    "SymInt length, str order, str axis) -> Tensor"
)
LIB.define(
    "embed_backward(Tensor g, Tensor ids, int units, int padding, bool scaled, ScalarType dtype, "
    "SymInt rows, SymInt length, str order, str axis) -> Tensor"
)
# rows, lengths, orders: of the queries' sequence, and of the keys'. biased: the mask is added and
# wants a gradient too
LIB.define(
    f"attention({OPERANDS}, {FIELDS}, SymInt[] rows, SymInt[] lengths, str[] orders, str axis) "
    "-> (Tensor, Tensor)"
)
LIB.define(
    f"attention_backward(Tensor g, {OPERANDS}, Tensor out, Tensor lse, bool biased, {FIELDS}, "
    "SymInt[] rows, SymInt[] lengths, str[] orders, str axis) -> Tensor[]"
)
# one region, D steps: `key` names its `Body`, which regions share; results: body.outs, then
# body.saves
LIB.define(f"fold({FOLD}) -> Tensor[]")
LIB.define(f"fold_backward(Tensor?[] gs, Tensor[] saved, {FOLD}) -> Tensor[]")


class FoldCall(NamedTuple):
    """The arguments of `fold`."""

    tokens: Sequence[torch.Tensor]
    invariants: Sequence[torch.Tensor]
    shards: Sequence[torch.Tensor]
    sizes: Sequence[Any]
    rows: Sequence[Any]
    lengths: Sequence[Any]
    region: str
    key: str
    axis: str


def pick(
    logits: torch.Tensor, labels: torch.Tensor, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """The logit of each label: [..., v], [...] -> [...]; labels outside of this shard's range
    give zero."""
    index = labels if offset is None else labels - offset
    inside = (index >= 0) & (index < logits.shape[-1])
    picked = logits.gather(-1, torch.where(inside, index, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(inside, picked, 0.0)


LIB.impl("pick", pick, "CompositeImplicitAutograd")

_CHUNKS = {"contiguous": 1, "zigzag": 2}


def local_rows(rows: Any, order: str) -> Any:
    """How many rows a rank has: chunks per rank times c."""
    return _CHUNKS[order] * rows


def resized(x: torch.Tensor, dim: int, size: Any) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"tspc::{name}", lib=LIB)


@_fake("whole_weight")
def _whole_weight_fake(local, dim, size, cut, axis):
    return torch.empty_like(local) if dim < 0 else resized(local, dim, size)


@_fake("whole_weight_backward")
def _whole_weight_backward_fake(g, dim, size, cut, axis, rows):
    return torch.empty_like(g) if dim < 0 else resized(g, dim, rows)


@_fake("whole")
@_fake("local_backward")
def _whole_fake(x, *others):
    at = Along(*others)
    return resized(x, at.dim, at.lead * at.length * at.trail)


@_fake("local")
@_fake("whole_backward")
def _local_fake(x, *others):
    at = Along(*others)
    return resized(x, at.dim, at.lead * local_rows(at.rows, at.order) * at.trail)


@_fake("in_range")
@_fake("clear_pads")
def _clear_fake(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_fake("all_reduce")
def _all_reduce_fake(x, axis):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_fake("vary")
@_fake("vary_backward")
def _vary_fake(xs, reduce, axis):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]


@_fake("gather_weight")
def _gather_weight_fake(shard, dim, size, partial, dtype, reduce, axis):
    return resized(shard, dim, size).to(dtype)


@_fake("gather_weight_backward")
def _gather_weight_backward_fake(g, dim, units, partial, dtype, reduce, axis):
    return resized(g, dim, units).to(dtype)


@_fake("embed")
def _embed_fake(shard, ids, padding, scaled, dtype, *layout):
    rows, _, order, _ = layout
    shape = [*ids.shape[:-1], local_rows(rows, order), shard.shape[1]]
    return shard.new_empty(shape, dtype=dtype)


@_fake("embed_backward")
def _embed_backward_fake(g, ids, units, padding, scaled, dtype, *_):
    return g.new_empty((units, g.shape[-1]), dtype=dtype)


@_fake("attention")
def _attention_fake(q, k, v, *_):
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse


@_fake("attention_backward")
def _attention_backward_fake(g, *others):
    qkv, mask, biased = others[:3], others[3], others[8]
    return [x.new_empty(x.shape) for x in (*qkv, *([mask] if biased else []))]


def _register(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"tspc::{name}", backward, setup_context=setup, lib=LIB)


def _keep_rest(ctx: Context, inputs: Arguments, output: object) -> None:
    ctx.rest = inputs[1:]


def _sequence_backward(op: str) -> Callable[..., Any]:
    def backward(ctx: Context, g: torch.Tensor) -> object:
        return (getattr(torch.ops.tspc, op)(g, *ctx.rest), *(None for _ in ctx.rest))

    return backward


def _whole_weight_setup(ctx: Context, inputs: Arguments, output: object) -> None:
    local, *ctx.rest = inputs
    ctx.rows = local.shape[ctx.rest[0]] if ctx.rest[0] >= 0 else 0


def _whole_weight_grad(ctx: Context, g: torch.Tensor) -> object:
    return (torch.ops.tspc.whole_weight_backward(g, *ctx.rest, ctx.rows), *(None for _ in ctx.rest))


_register("whole_weight", _whole_weight_setup, _whole_weight_grad)
_register("whole", _keep_rest, _sequence_backward("whole_backward"))
_register("local", _keep_rest, _sequence_backward("local_backward"))
_register("clear_pads", _keep_rest, _sequence_backward("clear_pads"))
_register("all_reduce", _keep_rest, lambda ctx, g: (g, None))


def _vary_setup(ctx: Context, inputs: Arguments, output: object) -> None:
    ctx.rest = inputs[1:]
    ctx.set_materialize_grads(False)  # what no result hangs on has no gradient, not one of zeros


def _vary_backward(ctx: Context, gs: list[torch.Tensor | None]) -> object:
    present = [i for i, g in enumerate(gs) if g is not None]
    reduced = torch.ops.tspc.vary_backward([gs[i] for i in present], *ctx.rest) if present else []
    out: list[torch.Tensor | None] = [None] * len(gs)
    for i, g in zip(present, reduced):
        out[i] = g
    return out, None, None


_register("vary", _vary_setup, _vary_backward)


def _gather_weight_setup(ctx: Context, inputs: Arguments, output: object) -> None:
    shard, ctx.dim, _, ctx.partial, _, ctx.reduce, ctx.axis = inputs
    ctx.units, ctx.dtype = shard.shape[ctx.dim], shard.dtype


def _gather_weight_backward(ctx: Context, g: torch.Tensor) -> object:
    context = (ctx.dim, ctx.units, ctx.partial, ctx.dtype, ctx.reduce, ctx.axis)
    return (torch.ops.tspc.gather_weight_backward(g, *context), *[None] * 6)


_register("gather_weight", _gather_weight_setup, _gather_weight_backward)


def _embed_setup(ctx: Context, inputs: Arguments, output: object) -> None:
    shard, ids, *flags, _, rows, length, order, axis = inputs
    ctx.rest = (shard.shape[0], *flags, shard.dtype, rows, length, order, axis)
    ctx.save_for_backward(ids)


def _embed_grad(ctx: Context, g: torch.Tensor) -> object:
    (ids,) = ctx.saved_tensors
    return (torch.ops.tspc.embed_backward(g, ids, *ctx.rest), *[None] * 8)


_register("embed", _embed_setup, _embed_grad)


def _attention_setup(ctx: Context, inputs: Arguments, output: Any) -> None:
    tensors, ctx.rest = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_grad(ctx: Context, g: torch.Tensor, _: Any) -> object:
    biased = ctx.needs_input_grad[3]
    grads = torch.ops.tspc.attention_backward(g, *ctx.saved_tensors, biased, *ctx.rest)
    mask = grads[3] if biased else None
    return (*grads[:3], mask, None, None, *(None for _ in ctx.rest))


_register("attention", _attention_setup, _attention_grad)


def _results(body: Body) -> list[tuple[str, bool]]:
    """(value, one block per j) of every result of a fold."""
    outs = [(o.name, o.kind != "sum") for o in body.outs]
    return outs + [(n, True) for n in body.saves]


@_fake("fold")
def _fold_fake(*args):
    f = FoldCall(*args)
    body = BODIES[f.key]
    local = [local_rows(c, e.order) for c, e in zip(f.rows, body.extents)]
    symbols = symbol_values(body, f.sizes, local)
    out = []
    for name, stacked in _results(body):
        value = body.values[name]
        shape = [evaluate(s, symbols) for s in value.shape]
        out.append(
            f.shards[0].new_empty([body.ranks, *shape] if stacked else shape, dtype=value.dtype)
        )
    return out


def _operands(body: Body) -> list[str]:
    return [*(t.name for t in body.tokens), *body.invariants, *body.shards]


@_fake("fold_backward")
def _fold_backward_fake(gs, saved, *args):
    f = FoldCall(*args)
    body = BODIES[f.key]
    operands = zip(_operands(body), [*f.tokens, *f.invariants, *f.shards])
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for n, x in operands
        if body.values[n].requires_grad
    ]


def _fold_setup(ctx: Context, inputs: Arguments, output: Any) -> None:
    tokens, invariants, shards, ctx.sizes, *ctx.rest = inputs
    body = BODIES[ctx.rest[-2]]
    ctx.counts = (len(tokens), len(invariants), len(shards))
    ctx.outs = len(body.outs)
    plain = [x for o, x in zip(body.outs, output) if not o.differentiable]
    ctx.mark_non_differentiable(*plain, *output[ctx.outs :])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tokens, *invariants, *shards, *output[ctx.outs :])


def _fold_grad(ctx: Context, gs: list[torch.Tensor | None]) -> object:
    body, operand_values = BODIES[ctx.rest[-2]], list(ctx.saved_tensors)
    operands: list[list[torch.Tensor]] = []
    for n in ctx.counts:
        operands.append(operand_values[:n])
        operand_values = operand_values[n:]
    context = (ctx.sizes, *ctx.rest)
    got = iter(
        torch.ops.tspc.fold_backward(list(gs[: ctx.outs]), operand_values, *operands, *context)
    )
    flat = [next(got) if body.values[n].requires_grad else None for n in _operands(body)]
    grads = []
    for n in ctx.counts:
        grads.append(flat[:n])
        flat = flat[n:]
    sizes = None if ctx.sizes else []  # torch takes an empty list for one of tensors
    return (*grads, sizes, *(None for _ in ctx.rest))


_register("fold", _fold_setup, _fold_grad)
