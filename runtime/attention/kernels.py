"""Attention of local queries against keys and values of the whole sequence: block kernels with
their log-sum-exp.

q [b, hq, n, d]; k, v [b, hk, n, d], hq a multiple of hk. A rank's rows are chunks of the layout;
a pad key is invalid for every query, a pad query takes the mask of the last real row
(docs/design.md, "Layouts"). Gathered K and V are never saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from tspc.ir.spec import Operands
from tspc.masks.score import modified, pulled_back
from tspc.runtime.attention.blocks import Blocks, Meeting, View
from tspc.runtime.attention.keys import gather, scatter
from tspc.runtime.comm.requests import Steps

__all__ = ["Meeting", "attend", "attend_backward", "gather", "scatter"]

aten = torch.ops.aten
Tensor = torch.Tensor


def _is_fused(q: Tensor, v: Tensor) -> bool:
    """The fused kernel of the CPU takes one head size."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


@lru_cache(maxsize=1)
def _takes_groups() -> bool:
    """Whether the fused kernel of this torch takes fewer K/V heads than query heads, forward and
    backward: asked of a small case."""
    q, k, v, g = (torch.arange(n).sin().view(1, -1, 3, 2) for n in (24, 12, 12, 24))
    whole = View()
    try:
        out, lse = _fused(q, k, v, whole)
        grads = _fused_backward(g, q, k, v, out, lse, whole)
    except RuntimeError:
        return False
    k, v = _repeated(k, 2), _repeated(v, 2)
    expected = _fused(q, k, v, whole)
    dq, dk, dv = _fused_backward(g, q, k, v, *expected, whole)
    pairs = zip((out, lse, *grads), (*expected, dq, _summed(dk, 2), _summed(dv, 2)))
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def _fused(q: Tensor, k: Tensor, v: Tensor, b: View) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, b.causal, attn_mask=_additive(b.mask, q), scale=b.scale
    )


def _fused_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, b: View
) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, out, lse, 0.0, b.causal, attn_mask=_additive(b.mask, q), scale=b.scale
    )


def _kernel(q: Tensor, k: Tensor, v: Tensor, b: View) -> tuple[Tensor, Tensor]:
    """Keys and values may have fewer heads than queries. A query that sees none of the keys has
    -inf."""
    groups = q.shape[1] // k.shape[1]
    if b.is_plain and _is_fused(q, v):
        if groups > 1 and not _takes_groups():
            k, v = _repeated(k, groups), _repeated(v, groups)
        out, lse = _fused(q, k, v, b)
        return out, lse if b.mask is None else lse.masked_fill(_sees_none(b.mask), -torch.inf)
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, _repeated(k, groups), _repeated(v, groups)))
    scores = _masked(modified(b.score, _scores(q, k, b.scale)), b)
    lse = torch.logsumexp(scores, -1)
    weights = _dropped(torch.exp(scores - _finite(lse, b.top).unsqueeze(-1)), b.factors)
    return (weights @ v).to(dtype), lse


def _kernel_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, b: View
) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    fused = b.is_plain and _is_fused(q, v)
    if fused and (groups == 1 or _takes_groups()):
        return _fused_backward(g, q, k, v, out, lse, b)
    k, v = _repeated(k, groups), _repeated(v, groups)
    if fused:
        dq, dk, dv = _fused_backward(g, q, k, v, out, lse, b)
        return dq, _summed(dk, groups), _summed(dv, groups)
    dq, dk, dv, _ = _written_out_backward(g, q, k, v, out, lse, b)
    return dq, _summed(dk, groups), _summed(dv, groups)


def _written_out_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, b: View
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, of k and v repeated for all heads, and of the scores with the mask added."""
    wide = torch.promote_types(q.dtype, torch.float32)
    g, q, k, v, out = (x.to(wide) for x in (g, q, k, v, out))
    scores = _scores(q, k, b.scale)
    weights = torch.exp(_masked(modified(b.score, scores), b) - lse.unsqueeze(-1))
    dv = _dropped(weights, b.factors).transpose(-1, -2) @ g
    delta = (g * out).sum(-1, keepdim=True)
    dw = _dropped(g @ v.transpose(-1, -2), b.factors)
    ds = weights * (dw - delta)
    di = pulled_back(b.score, scores, ds)
    return (di @ k) * b.scale, (di.transpose(-1, -2) @ q) * b.scale, dv, ds


def _dropped(x: Tensor, factors: Tensor | None) -> Tensor:
    return x if factors is None else x * factors


def _finite(lse: Tensor, top: Tensor | None = None) -> Tensor:
    """Zero for what sees no key, so that its weights are zero; with a top it is NaN, as the
    model's."""
    return lse if top is not None else lse.masked_fill(lse == -torch.inf, 0.0)


def _sees_none(mask: Tensor) -> Tensor:
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return ~seen.any(-1)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q @ k.transpose(-1, -2)) * scale


def _masked(scores: Tensor, b: View) -> Tensor:
    if b.causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~keep, -torch.inf)
    mask = _additive(b.mask, scores)
    scores = scores if mask is None else scores + mask
    return scores if b.top is None else scores - b.top.to(scores.dtype)


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)


def _repeated(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _summed(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.unflatten(1, (-1, groups)).sum(2)


def attend(x: Operands[Tensor], m: Meeting, chunks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Attention of the local queries, the rows of `chunks`, against the whole sequence of keys and
    values in order.

    -> out like q, lse [b, hq, n] in fp32 or wider.
    """
    q, k, v = x.q, x.k, x.v
    wide = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    blocks = Blocks(m, x, tuple(chunks))
    for run, top in blocks.runs():
        rows = q[:, :, run.q0 : run.q1]
        out = rows.new_zeros((*rows.shape[:-1], v.shape[-1])) if not run.blocks else None
        lse = q.new_full(rows.shape[:-1], -torch.inf, dtype=wide)
        for b in run.blocks:
            k_b, v_b = k[:, :, b.k0 : b.k1], v[:, :, b.k0 : b.k1]
            more, other = _kernel(rows, k_b, v_b, blocks.view(run, b, top, wide))
            if out is None:
                out, lse = more, other
                continue
            both = torch.logaddexp(lse, other)
            one = _finite(both)
            merged = out.to(both.dtype) * (lse - one).exp().unsqueeze(-1)
            merged = merged + more.to(both.dtype) * (other - one).exp().unsqueeze(-1)
            out, lse = merged.to(q.dtype), both
        outs.append(out)
        lses.append(_finite(lse, top))
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs, 2), torch.cat(lses, 2)


def attend_backward(
    g: Tensor,
    x: Operands[Tensor],
    done: tuple[Tensor, Tensor],
    m: Meeting,
    chunks: Sequence[int],
    biased: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of q, and of k and v over the whole sequence, from the global out and lse; in fp32
    or wider.

    biased: of the mask too, which is added, summed over what it is broadcast along.
    """
    q, k, v, (out, lse) = x.q, x.k, x.v, done
    wide = torch.promote_types(q.dtype, torch.float32)
    blocks = Blocks(m, x, tuple(chunks))
    runs = list(blocks.runs())
    if len(runs) == 1 and len(runs[0][0].blocks) == 1 and q.dtype == wide and not biased:
        ((run, top),) = runs
        b = run.blocks[0]
        if (b.k0, b.k1) == (0, k.shape[2]):
            return _kernel_backward(g, q, k, v, out, lse, blocks.view(run, b, top, wide))
    groups = q.shape[1] // k.shape[1]
    dq = torch.zeros_like(q, dtype=wide)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    dmask = torch.zeros_like(x.mask, dtype=wide) if biased and x.mask is not None else None
    for run, top in runs:
        at = slice(run.q0, run.q1)
        g_r, q_r, out_r, lse_r = (y[:, :, at] for y in (g, q, out, lse))
        for b in run.blocks:
            keys = slice(b.k0, b.k1)
            k_b, v_b = k[:, :, keys], v[:, :, keys]
            state = out_r, lse_r, blocks.view(run, b, top, wide)
            if dmask is None:
                dq_b, dk_b, dv_b = _kernel_backward(g_r, q_r, k_b, v_b, *state)
            else:
                k_b, v_b = _repeated(k_b, groups), _repeated(v_b, groups)
                dq_b, dk_b, dv_b, ds = _written_out_backward(g_r, q_r, k_b, v_b, *state)
                dk_b, dv_b = _summed(dk_b, groups), _summed(dv_b, groups)
                part = b.of(dmask)
                part += ds.sum_to_size(part.shape)
            dq[:, :, at] += dq_b
            dk[:, :, keys] += dk_b
            dv[:, :, keys] += dv_b
    return (dq, dk, dv) if dmask is None else (dq, dk, dv, dmask)


def attention(rank: int, x: Operands[Tensor], m: Meeting) -> Steps:
    """Local q, k, v -> (out, lse) of the local queries."""
    keys, values = yield from gather(rank, m, x.k, x.v)
    whole = replace(x, k=keys, v=values)
    out, lse = attend(whole, m, m.queries.layout.chunk_ids(rank))
    return out.contiguous(), lse.contiguous()


def attention_backward(
    rank: int,
    g: Tensor,
    x: Operands[Tensor],
    done: tuple[Tensor, Tensor],
    m: Meeting,
    biased: bool,
) -> Steps:
    """Cotangent of the local out -> (dq, dk, dv) of the local rows, and that of the mask if it is
    `biased`; K and V are gathered again. done: out and lse."""
    keys, values = yield from gather(rank, m, x.k, x.v)
    whole, chunks = replace(x, k=keys, v=values), m.queries.layout.chunk_ids(rank)
    dq, dk, dv, *bias_grads = attend_backward(g, whole, done, m, chunks, biased)
    dk, dv = yield from scatter(rank, m, dk, dv)
    pairs = zip((dq, dk, dv, *bias_grads), (x.q, x.k, x.v, x.mask))
    return [d.to(y.dtype).contiguous() for d, y in pairs if y is not None]
