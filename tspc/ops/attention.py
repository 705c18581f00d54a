"""Attention as the one op that a program has for it: of a node its operands and its spec, and what
it means on one device. On ranks it is `tspc::attention`, or a step of a fold's body.

With a sink s, a learned logit per head beside the scores whose share of the softmax goes nowhere,
out = attention's out · exp(lse - lse'), lse' = logaddexp(lse, s). Attention's own backward is right
as it is when it is given these two: its weights are exp(score - lse').
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from tspc.ir.program import SDPA, Node, Ref
from tspc.ir.spec import AttentionSpec, Operands
from tspc.masks import predicate as predicates
from tspc.masks.score import modified
from tspc.ops.counter import kept_keys
from tspc.ops.library import LIB

Tensor = torch.Tensor

LIB.define(
    "scaled_dot_product_attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, "
    "Tensor? states=None, Tensor? data=None, Tensor? sinks=None, *, bool causal=False, "
    "float? scale=None, float dropout=0.0, str predicate='', float fill=0.0, str score='', "
    "bool grouped=False, SymInt[] sizes=[]) -> Tensor"
)
ATTENTION = torch.ops.tspc.scaled_dot_product_attention.default
# torch's names of what ours has too
_NAMES = {
    "query": "q",
    "key": "k",
    "value": "v",
    "attn_mask": "mask",
    "dropout_p": "dropout",
    "is_causal": "causal",
    "enable_gqa": "grouped",
}


def bound(n: Node) -> tuple[Operands[Ref], AttentionSpec]:
    """Of a node of this op, or of torch's."""
    assert n.op in (SDPA, ATTENTION)
    arguments = dict(zip((a.name for a in n.op._schema.arguments), n.args)) | n.kwargs
    values = {_NAMES.get(name, name): value for name, value in arguments.items()}
    operands = {f.name: values.pop(f.name) for f in fields(Operands) if f.name in values}
    kinds = {"causal": bool, "dropout": float, "fill": float, "sizes": tuple}
    settings = {name: kinds.get(name, lambda x: x)(value) for name, value in values.items()}
    return Operands(**operands), AttentionSpec(**settings)


def spelled(n: Node, x: Operands[Ref], a: AttentionSpec) -> Node:
    """The node as this attention."""
    return replace(n, op=ATTENTION, args=x.args, kwargs=a.kwargs)


def attention(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None, **settings: Any) -> Tensor:
    """softmax(score(q kᵀ · scale) + mask) v; torch's own op where it has all that is asked for."""
    x, a = Operands(q, k, v, *others), AttentionSpec(**settings)
    beyond = x.states is not None or x.data is not None or x.sinks is not None
    if not (beyond or a.predicate or a.fill or a.score or (a.causal and x.mask is not None)):
        context = {"scale": a.scale, "enable_gqa": a.grouped}
        return SDPA(q, k, v, x.mask, a.dropout, a.causal, **context)
    assert x.states is not None or not a.dropout, "keys are dropped by the states of the queries"
    if a.grouped:
        k, v = (y.repeat_interleave(q.shape[-3] // y.shape[-3], -3) for y in (k, v))
    shares = _weights(_scores(replace(x, k=k), a), x.sinks, a.fill)
    if x.states is not None:
        keep = kept_keys(x.states, 0, k.shape[-2], a.dropout)
        factor = 1.0 / (1.0 - a.dropout) if a.dropout < 1 else 0.0
        shares = torch.where(keep, shares * factor, 0.0)
    return shares.to(v.dtype) @ v


LIB.impl("scaled_dot_product_attention", attention, "CompositeImplicitAutograd")


def _scores(x: Operands[Tensor], a: AttentionSpec) -> Tensor:
    """q kᵀ · scale, what `score` makes of it, + mask, in fp32 or wider."""
    scores = (x.q @ x.k.transpose(-1, -2)) * a.factor(x.q.shape[-1])
    scores = scores.to(torch.promote_types(x.q.dtype, torch.float32))
    scores = modified(a.score, scores)
    q, k = (torch.arange(n, device=x.q.device) for n in scores.shape[-2:])
    if x.mask is not None:
        additive = x.mask.dtype != torch.bool
        scores = scores + x.mask if additive else scores.masked_fill(~x.mask, -torch.inf)
    keep = q[:, None] >= k[None] if a.causal else None
    if a.predicate:
        more = predicates.mask(a.predicate, q, k, a.sizes, x.data)
        keep = more if keep is None else keep & more
    if keep is not None:
        hidden = torch.zeros_like(keep, dtype=scores.dtype)
        scores = scores + hidden.masked_fill(~keep, a.fill or -torch.inf)
    return scores


def _weights(scores: Tensor, sinks: Tensor | None, fill: float) -> Tensor:
    """Softmax over the keys, and a sink beside them."""
    if sinks is not None:
        beside = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, beside], -1), -1)[..., :-1]
    if fill:
        return torch.softmax(scores, -1)
    seen = (scores > -torch.inf).any(-1, keepdim=True)
    return torch.where(seen, torch.softmax(torch.where(seen, scores, 0.0), -1), 0.0)


def sunk(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention's out [b, h, n, d] and lse [b, h, n] with the sinks [h] of its heads."""
    both = torch.logaddexp(lse, sinks.to(lse.dtype).view(-1, 1))
    return (out.to(both.dtype) * (lse - both).exp().unsqueeze(-1)).to(out.dtype), both


def sinks_gradient(g: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """From what `sunk` made; g: the cotangent of out, zero in pad rows."""
    share = (sinks.to(lse.dtype).view(-1, 1) - lse).exp()
    return -(share * (g.to(lse.dtype) * out.to(lse.dtype)).sum(-1)).sum((0, 2))
