"""The stationary schedule: tokens are gathered, each rank runs its own shard, outputs are
scattered (Megatron TP + SP)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tspc.ir.body import Piece
from tspc.runtime.comm.exchange import join, part
from tspc.runtime.comm.requests import AllGather, AllToAll, ReduceScatter, Steps
from tspc.runtime.fold.step import (
    Call,
    Resident,
    Values,
    attended,
    in_operand_order,
    step_backward,
)

Tensor = torch.Tensor


def _gather_tokens(call: Call) -> Steps[Values]:
    """Every token's rows of all ranks end to end, in rank order."""
    out: Values = {}
    for spec, t in zip(call.body.tokens, call.tokens):
        lead = call.lead(spec.lead)
        if spec.whole:
            blocks = torch.stack([call.rows_of(spec, t, lead, r) for r in range(call.axis.size)])
        else:
            handle = yield AllGather(t)
            blocks = handle.wait()
        out[spec.name] = join(blocks, spec.dim, lead)
    return out


def _by_rank(call: Call, x: Tensor, dim: int, lead: int) -> Tensor:
    """Rows of all ranks end to end -> [D, local]."""
    return part(x, call.axis.size, dim, lead).contiguous()


def stationary_forward(call: Call) -> Steps[tuple[list[Tensor], list[Tensor]]]:
    """-> (sums and stacks in the order of body.outs, saved)."""
    body, axis = call.body, call.axis
    values = yield from _gather_tokens(call)
    values.update(call.invariant_values())
    values.update(call.own())
    symbols = call.symbols(axis.size)
    step, exchange = call.step(axis.rank), Resident(call)
    for index, s in enumerate(body.steps):
        if isinstance(s, Piece):
            values.update(call.pieces.forward(index, symbols, step, values))
        else:
            values[s.out], values[s.lse] = yield from attended(exchange, s, values)
    real = axis.rank * body.units < body.size
    outs = []
    for o in body.outs:
        lead = call.lead(o.lead)
        x = values[o.name]
        if not real:
            x = torch.full_like(x, -torch.inf if o.kind == "lse" else 0.0)
        blocks = _by_rank(call, x, o.dim, lead)
        if o.kind == "sum":
            wide = torch.promote_types(x.dtype, torch.float32)
            handle = yield ReduceScatter(blocks.to(wide))
            outs.append(handle.wait().to(x.dtype))
        else:
            handle = yield AllToAll(blocks)
            outs.append(handle.wait())
    return outs, call.saved(values)


def stationary_backward(
    call: Call, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> Steps:
    """From the cotangents of body.outs (None: zero) to the gradients of tokens, invariants and
    shards."""
    body, axis = call.body, call.axis
    values = yield from _gather_tokens(call)
    values.update(call.invariant_values())
    values.update(call.own())
    values.update(call.restored(saved))
    of_outs: Values = {}
    for o, g in zip(body.outs, cotangents):
        if g is None:
            continue
        handle = yield AllGather(g) if o.kind == "sum" else AllToAll(g)
        of_outs[o.name] = join(handle.wait(), o.dim, call.lead(o.lead))
    symbols = call.symbols(axis.size)
    real = axis.rank * body.units < body.size
    grads: Values = {}
    if real:
        exchange = Resident(call)
        grads = yield from step_backward(call, symbols, axis.rank, values, of_outs, exchange)
    total: Values = {}
    for spec in body.tokens:
        if not body.values[spec.name].requires_grad:
            continue
        lead = call.lead(spec.lead)
        g = grads.pop(spec.name, None)
        if g is None:
            g = torch.zeros_like(values[spec.name])
        wide = torch.promote_types(values[spec.name].dtype, torch.float32)
        handle = yield ReduceScatter(_by_rank(call, g.to(wide), spec.dim, lead))
        total[spec.name] = handle.wait()
    for name in body.invariants:
        if name in grads:
            total[name] = grads.pop(name)
    return in_operand_order(call, total, grads)
