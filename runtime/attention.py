"""Attention of local queries against keys and values of the whole sequence: block kernels with
their log-sum-exp.

q [b, hq, n, d]; k, v [b, hk, n, d], hq a multiple of hk. A rank's rows are chunks of the layout;
a pad key is invalid for every query, a pad query takes the mask of the last real row (DESIGN
section 8). Gathered K and V are never saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from tspc.runtime.requests import AllGather, ReduceScatter, Steps

from tspc.counter import kept_keys
from tspc.layout import Layout

aten = torch.ops.aten
Tensor = torch.Tensor


@dataclass(frozen=True)
class Span:
    """A sequence on the ranks: its layout and sizes."""

    layout: Layout
    rows: int
    length: int


@dataclass(frozen=True)
class Spec:
    """What one attention is: the scale, causal or not, the sizes of the queries' layout, and with
    which probability a key is dropped.

    keys: how many, where they are of another sequence.
    """

    causal: bool
    scale: float
    rows: int
    length: int
    dropout: float = 0.0
    keys: int | None = None


@dataclass(frozen=True)
class _Block:
    """Queries [q0, q1) of the local rows against keys [0 or k0, k1) of the sequence."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    mask: Tensor | None = None

    def factors(self, states: Tensor | None, p: float, dtype: torch.dtype) -> Tensor | None:
        """What dropout multiplies each weight by: zero or 1 / (1 - p)."""
        if states is None:
            return None
        kept = kept_keys(states[:, :, self.q0 : self.q1], self.k0, self.k1, p)
        return kept.to(dtype) * (1.0 / (1.0 - p) if p < 1 else 0.0)


def _blocks(
    spec: Spec, chunks: Sequence[int], mask: Tensor | None, device: torch.device
) -> list[list[_Block]]:
    """The blocks of each run of queries; those of one run are merged."""
    c, s = spec.rows, spec.length
    keys = s if spec.keys is None else spec.keys
    if mask is not None:
        if spec.causal:
            at = torch.cat([torch.arange(g * c, (g + 1) * c) for g in chunks]).clamp(max=s - 1)
            mask = _and_causal(mask, at.to(device))
        return [[_Block(0, len(chunks) * c, 0, keys, False, mask)]]
    if not spec.causal:
        return [[_Block(0, len(chunks) * c, 0, keys, False)]]
    if list(chunks) == list(range(len(chunks))):  # the whole sequence in order
        return [[_Block(0, len(chunks) * c, 0, s, True)]]
    out = []
    for i, g in enumerate(chunks):
        run = []
        if g:
            run.append(_Block(i * c, (i + 1) * c, 0, min(g * c, s), False))
        if g * c < s:
            run.append(_Block(i * c, (i + 1) * c, g * c, min((g + 1) * c, s), True))
        out.append(run)
    return out


def _and_causal(mask: Tensor, at: Tensor) -> Tensor:
    """A mask, additive or bool, and causal for the queries at these positions."""
    keep = torch.arange(mask.shape[-1], device=mask.device)[None] <= at[:, None]
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)


def _is_fused(q: Tensor, v: Tensor) -> bool:
    """The fused kernel of the CPU takes one head size."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


@lru_cache(maxsize=1)
def _takes_groups() -> bool:
    """Whether the fused kernel of this torch takes fewer K/V heads than query heads, forward and
    backward: asked of a small case."""
    q, k, v, g = (torch.arange(n).sin().view(1, -1, 3, 2) for n in (24, 12, 12, 24))
    whole = _Block(0, 3, 0, 3, False)
    try:
        out, lse = _fused(q, k, v, whole, 1.0)
        grads = _fused_backward(g, q, k, v, out, lse, whole, 1.0)
    except RuntimeError:
        return False
    k, v = _repeated(k, 2), _repeated(v, 2)
    expected = _fused(q, k, v, whole, 1.0)
    dq, dk, dv = _fused_backward(g, q, k, v, *expected, whole, 1.0)
    pairs = zip((out, lse, *grads), (*expected, dq, _summed(dk, 2), _summed(dv, 2)))
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def _fused(q: Tensor, k: Tensor, v: Tensor, b: _Block, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, b.causal, attn_mask=_additive(b.mask, q), scale=scale
    )


def _fused_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, b: _Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, out, lse, 0.0, b.causal, attn_mask=_additive(b.mask, q), scale=scale
    )


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, b: _Block, scale: float, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """K and V may have fewer heads than q."""
    groups = q.shape[1] // k.shape[1]
    if factors is None and _is_fused(q, v):
        if groups > 1 and not _takes_groups():
            k, v = _repeated(k, groups), _repeated(v, groups)
        return _fused(q, k, v, b, scale)
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, _repeated(k, groups), _repeated(v, groups)))
    scores = _scores(q, k, b, scale)
    lse = torch.logsumexp(scores, -1)
    weights = _dropped(torch.nan_to_num(torch.exp(scores - lse.unsqueeze(-1)), 0.0), factors)
    return (weights @ v).to(dtype), lse


def _kernel_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    b: _Block,
    scale: float,
    factors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    fused = factors is None and _is_fused(q, v)
    if fused and (groups == 1 or _takes_groups()):
        return _fused_backward(g, q, k, v, out, lse, b, scale)
    k, v = _repeated(k, groups), _repeated(v, groups)
    if fused:
        dq, dk, dv = _fused_backward(g, q, k, v, out, lse, b, scale)
        return dq, _summed(dk, groups), _summed(dv, groups)
    dq, dk, dv, _ = _written_out_backward(g, q, k, v, out, lse, b, scale, factors)
    return dq, _summed(dk, groups), _summed(dv, groups)


def _written_out_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    b: _Block,
    scale: float,
    factors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, of k and v repeated for all heads, and of the scores with the mask added."""
    wide = torch.promote_types(q.dtype, torch.float32)
    g, q, k, v, out = (x.to(wide) for x in (g, q, k, v, out))
    weights = torch.nan_to_num(torch.exp(_scores(q, k, b, scale) - lse.unsqueeze(-1)), 0.0)
    dv = _dropped(weights, factors).transpose(-1, -2) @ g
    delta = (g * out).sum(-1, keepdim=True)
    ds = weights * (_dropped(g @ v.transpose(-1, -2), factors) - delta)
    return (ds @ k) * scale, (ds.transpose(-1, -2) @ q) * scale, dv, ds


def _dropped(x: Tensor, factors: Tensor | None) -> Tensor:
    return x if factors is None else x * factors


def _scores(q: Tensor, k: Tensor, b: _Block, scale: float) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * scale
    if b.causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~keep, -torch.inf)
    mask = _additive(b.mask, q)
    return scores if mask is None else scores + mask


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)


def _repeated(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _summed(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.unflatten(1, (-1, groups)).sum(2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Sequence[int],
    spec: Spec,
    mask: Tensor | None = None,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Q: the rows of `chunks`; k, v: the whole sequence in order; states: [b, hq, n], from which
    the dropped keys are drawn.

    -> out like q, lse [b, hq, n] in fp32 or wider.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    for run in _blocks(spec, chunks, mask, q.device):
        parts = []
        for b in run:
            keys = (x[:, :, b.k0 : b.k1] for x in (k, v))
            factors = b.factors(states, spec.dropout, wide)
            parts.append(_kernel(q[:, :, b.q0 : b.q1], *keys, b, spec.scale, factors))
        out, lse = parts[0]
        for more, other in parts[1:]:
            both = torch.logaddexp(lse, other)
            merged = out.to(both.dtype) * (lse - both).exp().unsqueeze(-1)
            merged = merged + more.to(both.dtype) * (other - both).exp().unsqueeze(-1)
            out, lse = merged.to(q.dtype), both
        outs.append(out)
        lses.append(lse)
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs, 2), torch.cat(lses, 2)


def attend_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    chunks: Sequence[int],
    spec: Spec,
    mask: Tensor | None = None,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, and of k and v over the whole sequence, from the global out and lse; in fp32
    or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    runs = _blocks(spec, chunks, mask, q.device)
    if len(runs) == 1 and len(runs[0]) == 1 and q.dtype == wide:
        b = runs[0][0]
        factors = b.factors(states, spec.dropout, wide)
        return _kernel_backward(g, q, k, v, out, lse, b, spec.scale, factors)
    dq = torch.empty_like(q, dtype=wide)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for run in runs:
        for i, b in enumerate(run):
            at, keys = slice(b.q0, b.q1), slice(b.k0, b.k1)
            rows = (x[:, :, at] for x in (out, lse))
            pair = (x[:, :, keys] for x in (k, v))
            factors = b.factors(states, spec.dropout, wide)
            given = (g[:, :, at], q[:, :, at], *pair, *rows)
            grads = _kernel_backward(*given, b, spec.scale, factors)
            if i:
                dq[:, :, at] += grads[0]
            else:
                dq[:, :, at] = grads[0]
            dk[:, :, keys] += grads[1]
            dv[:, :, keys] += grads[2]
    return dq, dk, dv


def attend_backward_with_mask(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    chunks: Sequence[int],
    spec: Spec,
    mask: Tensor,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same and the gradient of an additive mask, summed over what it is broadcast along."""
    ((b,),) = _blocks(spec, chunks, mask, q.device)
    groups = q.shape[1] // k.shape[1]
    factors = b.factors(states, spec.dropout, torch.promote_types(q.dtype, torch.float32))
    pair = _repeated(k, groups), _repeated(v, groups)
    dq, dk, dv, ds = _written_out_backward(g, q, *pair, out, lse, b, spec.scale, factors)
    return dq, _summed(dk, groups), _summed(dv, groups), ds.sum_to_size(mask.shape)


def _packed(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A buffer for both with the sequence first, [n, b, hk, dk + dv], and views of it like k and
    like v."""
    b, heads, n, width = k.shape
    both = k.new_empty((n, b, heads, width + v.shape[-1]))
    views = both.permute(1, 2, 0, 3)
    return both, views[..., :width], views[..., width:]


def gather(span: Span, k: Tensor, v: Tensor) -> Steps:
    """K and V of the whole sequence, pads dropped: one communication."""
    both, keys, values = _packed(k, v)
    keys.copy_(k)
    values.copy_(v)
    handle = yield AllGather(both)
    whole = span.layout.whole(handle.wait().flatten(0, 1), 0, span.rows, span.length)
    whole = whole.permute(1, 2, 0, 3)
    return whole[..., : k.shape[-1]], whole[..., k.shape[-1] :]


def scatter(span: Span, dk: Tensor, dv: Tensor) -> Steps:
    """The transpose of `gather`: gradients of whole K and V, summed -> those of the local rows."""
    both, keys, values = _packed(dk, dv)
    keys.copy_(dk)
    values.copy_(dv)
    blocks = span.layout.blocks(both, 0, span.rows)
    handle = yield ReduceScatter(blocks.unflatten(0, (span.layout.ranks, -1)))
    mine = handle.wait().permute(1, 2, 0, 3)
    return mine[..., : dk.shape[-1]], mine[..., dk.shape[-1] :]


def attention(
    rank: int,
    spans: Sequence[Span],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    states: Tensor | None,
    spec: Spec,
) -> Steps:
    """Local q, k, v -> (out, lse) of the local queries. Spans: of queries and keys.

    mask: [b, h, local or 1, S], states: [b, h, local], of the local queries.
    """
    keys, values = yield from gather(spans[1], k, v)
    out, lse = attend(q, keys, values, spans[0].layout.chunk_ids(rank), spec, mask, states)
    return out.contiguous(), lse.contiguous()


def attention_backward(
    rank: int,
    spans: Sequence[Span],
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    states: Tensor | None,
    out: Tensor,
    lse: Tensor,
    biased: bool,
    spec: Spec,
) -> Steps:
    """Cotangent of the local out -> (dq, dk, dv) of the local rows, and that of the mask if it is
    `biased`; K and V are gathered again."""
    keys, values = yield from gather(spans[1], k, v)
    chunks = spans[0].layout.chunk_ids(rank)
    backward = attend_backward_with_mask if biased else attend_backward
    dq, dk, dv, *rest = backward(g, q, keys, values, out, lse, chunks, spec, mask, states)
    dk, dv = yield from scatter(spans[1], dk, dv)
    pairs = zip((dq, dk, dv, *rest), (q, k, v, mask))
    return [d.to(x.dtype).contiguous() for d, x in pairs]
