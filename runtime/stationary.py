"""The stationary schedule: tokens are gathered, each rank runs its own shard, outputs are
scattered (Megatron TP + SP)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tspc.runtime import attention as attn
from tspc.runtime.exchange import join, part, take
from tspc.runtime.requests import AllGather, AllToAll, ReduceScatter, Steps
from tspc.runtime.step import (
    Call,
    Values,
    all_chunks,
    attention_operands,
    in_operand_order,
    step_backward,
)

from tspc.body import Piece

Tensor = torch.Tensor


def _gather_tokens(call: Call) -> Steps:
    """Every token's rows of all ranks end to end in rank order; the chunk order is undone."""
    masks = {a.mask for a in call.body.attentions}
    out: Values = {}
    for spec, t in zip(call.body.tokens, call.tokens):
        lead = call.lead(spec.lead)
        if spec.name in masks:
            out[spec.name] = t
        elif spec.whole:
            blocks = [
                take(call.layout, r, t, spec.dim, lead, call.rows, call.length)
                for r in range(call.axis.size)
            ]
            out[spec.name] = _natural(
                call, join(torch.stack(blocks), spec.dim, lead), spec.dim, lead
            )
        else:
            handle = yield AllGather(t)
            out[spec.name] = _natural(call, join(handle.wait(), spec.dim, lead), spec.dim, lead)
    return out


def _chunks(call: Call, x: Tensor, dim: int, lead: int, order: Sequence[int]) -> Tensor:
    """Reorder the chunks of all ranks along the sequence."""
    if call.layout.chunks == 1:
        return x
    n = call.axis.size * call.layout.chunks
    parts = x.reshape(*x.shape[:dim], lead, n, -1, *x.shape[dim + 1 :])
    at = torch.tensor(list(order), device=x.device)
    return parts.index_select(dim + 1, at).reshape(x.shape)


def _natural(call: Call, x: Tensor, dim: int, lead: int) -> Tensor:
    at = {g: i for i, g in enumerate(call.layout.all_chunk_ids())}
    return _chunks(call, x, dim, lead, [at[g] for g in range(len(at))])


def _by_rank(call: Call, x: Tensor, dim: int, lead: int) -> Tensor:
    """Natural order -> [D, local]."""
    x = _chunks(call, x, dim, lead, call.layout.all_chunk_ids())
    return part(x, call.axis.size, dim, lead).contiguous()


def stationary_forward(call: Call) -> Steps:
    body, axis = call.body, call.axis
    values = yield from _gather_tokens(call)
    values.update(call.invariant_values())
    values.update(call.unpack(call.flat()))
    symbols = call.symbols(axis.size * call.local_rows)
    step = call.step(axis.rank)
    for index, s in enumerate(body.steps):
        if isinstance(s, Piece):
            values.update(call.pieces.forward(index, symbols, step, values))
        else:
            q, k, v, mask = attention_operands(s, values)
            k, v = (x[:, :, : call.length] for x in (k, v))
            out, lse = attn.attend(q, k, v, all_chunks(call), call.spec(s), mask)
            values[s.out], values[s.lse] = out, lse
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
    saved = [_by_rank(call, values[n], 2, 1) for a in body.attentions for n in (a.out, a.lse)]
    return outs, saved


def stationary_backward(
    call: Call, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> Steps:
    body, axis = call.body, call.axis
    values = yield from _gather_tokens(call)
    values.update(call.invariant_values())
    values.update(call.unpack(call.flat()))
    names = [n for a in body.attentions for n in (a.out, a.lse)]
    for n, t in zip(names, saved):
        values[n] = _natural(call, join(t, 2, 1), 2, 1)
    given: Values = {}
    for o, g in zip(body.outs, cotangents):
        if g is None:
            continue
        lead = call.lead(o.lead)
        if o.kind == "sum":
            handle = yield AllGather(g)
        else:
            handle = yield AllToAll(g)
        given[o.name] = _natural(call, join(handle.wait(), o.dim, lead), o.dim, lead)
    symbols = call.symbols(axis.size * call.local_rows)
    real = axis.rank * body.units < body.size
    grads: Values = {}
    if real:
        grads = yield from step_backward(call, symbols, axis.rank, values, given, True)
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
