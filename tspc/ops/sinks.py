"""Attention with sinks: a learned logit per head beside the scores, whose share of the softmax goes
nowhere.

With a sink s, out = attention's out · exp(lse - lse'), lse' = logaddexp(lse, s). Attention's own
backward is right as it is when it is given these two: its weights are exp(score - lse').
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tspc.ops.library import LIB
from tspc.ops.masked import scores_of

Tensor = torch.Tensor

# sinks: [heads]; here on one device, in the body of a fold on ranks
LIB.define(
    "sink_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, "
    "bool is_causal, Tensor sinks, *, Tensor? rows=None, str predicate='', SymInt[] sizes=[], "
    "str score='', float? scale=None, bool enable_gqa=False) -> Tensor"
)


def sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    sinks: Tensor,
    *,
    rows: Tensor | None = None,
    predicate: str = "",
    sizes: Sequence[int] = (),
    score: str = "",
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax([q kᵀ · scale + mask, sink]) without its last column, times v: a mask, `is_causal`,
    predicate and score of `tspc.ops.masked` hold together. No dropout."""
    assert not dropout_p, "attention with sinks has no dropout"
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    masking = (attn_mask, is_causal, scale, rows, predicate, sizes)
    scores = scores_of(query, key, *masking, score=score)
    beside = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.softmax(torch.cat([scores, beside], -1), -1)[..., :-1]
    return weights.to(value.dtype) @ value


LIB.impl("sink_attention", sink_attention, "CompositeImplicitAutograd")
SINK_ATTENTION = torch.ops.tspc.sink_attention.default


def sunk(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention's out [b, h, n, d] and lse [b, h, n] with the sinks [h] of its heads."""
    both = torch.logaddexp(lse, sinks.to(lse.dtype).view(-1, 1))
    return (out.to(both.dtype) * (lse - both).exp().unsqueeze(-1)).to(out.dtype), both


def sinks_gradient(g: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """From what `sunk` made; g: the cotangent of out, zero in pad rows."""
    share = (sinks.to(lse.dtype).view(-1, 1) - lse).exp()
    return -(share * (g.to(lse.dtype) * out.to(lse.dtype)).sum(-1)).sum((0, 2))
