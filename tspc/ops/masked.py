"""Attention under a predicate instead of a mask, as one op, and what it means on one device.

rows, predicate, sizes: data, text and sizes of `tspc.masks.predicate`; "" is no predicate. fill:
what is added to a score where the predicate is false, in a softmax that is as the model has it: NaN
for a query of nothing but -inf, the mean of all values where all scores are lost in a low number.
0: as torch's op, which gives zeros for a query without a key. score: what is done to a score
before, as `tspc.masks.score`'s text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tspc.masks import predicate as predicates
from tspc.masks.score import modified
from tspc.ops.library import LIB

Tensor = torch.Tensor

# its first six arguments are those of torch's attention; a mask, `is_causal` and the predicate hold
# together
LIB.define(
    "masked_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, "
    "bool is_causal, *, Tensor? rows=None, str predicate='', SymInt[] sizes=[], float fill=0.0, "
    "str score='', float? scale=None, bool enable_gqa=False) -> Tensor"
)


def scores_of(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None = None,
    rows: Tensor | None = None,
    predicate: str = "",
    sizes: Sequence[int] = (),
    fill: float = 0.0,
    score: str = "",
) -> Tensor:
    """q kᵀ · scale, what `score` makes of it, + mask, in fp32 or wider."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-1, -2)) * factor
    scores = scores.to(torch.promote_types(query.dtype, torch.float32))
    scores = modified(score, scores)
    q, k = (torch.arange(n, device=query.device) for n in scores.shape[-2:])
    hidden = fill or -torch.inf
    if attn_mask is not None:
        additive = attn_mask.dtype != torch.bool
        scores = scores + attn_mask if additive else scores.masked_fill(~attn_mask, -torch.inf)
    keep = q[:, None] >= k[None] if is_causal else None
    if predicate:
        more = predicates.mask(predicate, q, k, sizes, rows)
        keep = more if keep is None else keep & more
    if keep is not None:
        scores = scores + torch.zeros_like(keep, dtype=scores.dtype).masked_fill(~keep, hidden)
    return scores


def weights(*given: Any, fill: float = 0.0, score: str = "") -> Tensor:
    """Softmax of `scores_of`."""
    scores = scores_of(*given, fill=fill, score=score)
    if fill:
        return torch.softmax(scores, -1)
    seen = (scores > -torch.inf).any(-1, keepdim=True)
    return torch.where(seen, torch.softmax(torch.where(seen, scores, 0.0), -1), 0.0)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    rows: Tensor | None = None,
    predicate: str = "",
    sizes: Sequence[int] = (),
    fill: float = 0.0,
    score: str = "",
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    assert not dropout_p, "`tspc::dropout_attention` drops keys"
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    rest = (attn_mask, is_causal, scale, rows, predicate, sizes)
    return weights(query, key, *rest, fill=fill, score=score).to(value.dtype) @ value


LIB.impl("masked_attention", masked_attention, "CompositeImplicitAutograd")
MASKED_ATTENTION = torch.ops.tspc.masked_attention.default
