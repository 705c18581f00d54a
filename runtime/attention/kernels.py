"""Attention of local queries against keys and values of the whole sequence: block kernels with
their log-sum-exp.

q [b, hq, n, d]; k, v [b, hk, n, d], hq a multiple of hk. A rank's rows are chunks of the layout;
a pad key is invalid for every query, a pad query takes the mask of the last real row
(docs/design.md, "Layouts"). Gathered K and V are never saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tspc.ir.spec import Operands
from tspc.runtime.attention import table
from tspc.runtime.attention.blocks import Blocks, Meeting
from tspc.runtime.attention.keys import gather, scatter
from tspc.runtime.attention.table import finite
from tspc.runtime.comm.requests import Steps

__all__ = ["Meeting", "attend", "attend_backward", "gather", "scatter"]

Tensor = torch.Tensor


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
            more, other = table.forward(rows, k_b, v_b, blocks.view(run, b, top, wide))
            if out is None:
                out, lse = more, other
                continue
            both = torch.logaddexp(lse, other)
            one = finite(both)
            merged = out.to(both.dtype) * (lse - one).exp().unsqueeze(-1)
            merged = merged + more.to(both.dtype) * (other - one).exp().unsqueeze(-1)
            out, lse = merged.to(q.dtype), both
        outs.append(out)
        lses.append(finite(lse, top))
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
            return table.backward(g, q, k, v, out, lse, blocks.view(run, b, top, wide))
    dq = torch.zeros_like(q, dtype=wide)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    dmask = torch.zeros_like(x.mask, dtype=wide) if biased and x.mask is not None else None
    for run, top in runs:
        at = slice(run.q0, run.q1)
        g_r, q_r, out_r, lse_r = (y[:, :, at] for y in (g, q, out, lse))
        for b in run.blocks:
            keys = slice(b.k0, b.k1)
            k_b, v_b = k[:, :, keys], v[:, :, keys]
            view = blocks.view(run, b, top, wide)
            if dmask is not None:
                view = replace(view, added=b.of(dmask))
            dq_b, dk_b, dv_b = table.backward(g_r, q_r, k_b, v_b, out_r, lse_r, view)
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
