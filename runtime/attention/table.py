"""Kernels for one block of attention, as a table: the first that takes a block, and does on this
device what is written out, computes it.

q [b, hq, n, d]; k [b, hk, m, d], v [b, hk, m, dv], hq a multiple of hk. Forward gives out
[b, hq, n, dv] and the natural log-sum-exp [b, hq, n]; backward takes them as they are over all
blocks of a query, not of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from tspc.base.journal import log
from tspc.masks.score import modified, pulled_back
from tspc.runtime.attention import facts
from tspc.runtime.attention.blocks import View
from tspc.seams.tensors import FakeTensor

aten = torch.ops.aten
Tensor = torch.Tensor
TILE = 2**24  # scores that are alive at a time where they are written out
LSE_ROWS = 32  # the memory-efficient kernel pads its log-sum-exp to so many
ALIGNED = 8  # keys: it takes rows of a mask that begin at multiples
HALF = (torch.bfloat16, torch.float16)
Forward = Callable[[Tensor, Tensor, Tensor, View], tuple[Tensor, Tensor]]
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, View], tuple[Tensor, Tensor, Tensor]
]


@dataclass(frozen=True)
class Case:
    """What decides which kernel takes a block. d, dv: head sizes. square: as many rows as keys."""

    device: torch.device
    dtype: torch.dtype
    d: int
    dv: int
    causal: bool
    masked: bool
    grouped: bool
    square: bool = True


@dataclass(frozen=True)
class Kernel:
    """One entry. takes: asked of a block as it is, and where it has fewer K/V heads than query
    heads, once more with keys and values repeated."""

    name: str
    takes: Callable[[Case], bool]
    forward: Forward
    backward: Backward


def forward(q: Tensor, k: Tensor, v: Tensor, b: View) -> tuple[Tensor, Tensor]:
    """A query that sees none of the keys has a log-sum-exp of -inf."""
    groups, (kernel, is_grouped) = q.shape[1] // k.shape[1], chosen(q, k, v, b)
    if not is_grouped:
        k, v = repeated(k, groups), repeated(v, groups)
    return kernel.forward(q, k, v, b)


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, b: View
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    groups, (kernel, is_grouped) = q.shape[1] // k.shape[1], chosen(q, k, v, b)
    if is_grouped:
        return kernel.backward(g, q, k, v, out, lse, b)
    k, v = repeated(k, groups), repeated(v, groups)
    dq, dk, dv = kernel.backward(g, q, k, v, out, lse, b)
    return dq, summed(dk, groups), summed(dv, groups)


def chosen(q: Tensor, k: Tensor, v: Tensor, b: View) -> tuple[Kernel, bool]:
    """The kernel of a block, and whether it takes fewer K/V heads than query heads."""
    grouped = q.shape[1] != k.shape[1]
    hidden = b.causal, b.mask is not None
    square = q.shape[2] == k.shape[2]
    case = Case(q.device, q.dtype, q.shape[-1], v.shape[-1], *hidden, grouped, square)
    is_fake = isinstance(q, FakeTensor)
    kernel, is_grouped = _chosen(case, KERNELS if b.is_plain else (), is_fake)
    if is_fake:
        facts.KERNELS.append(kernel.name)
    return kernel, is_grouped


@lru_cache(maxsize=256)
def _chosen(case: Case, kernels: tuple[Kernel, ...], is_fake: bool) -> tuple[Kernel, bool]:
    for kernel in kernels:
        for tried in (case, replace(case, grouped=False)) if case.grouped else (case,):
            if kernel.takes(tried) and (is_fake or _agrees(kernel, tried)):
                return kernel, tried.grouped
    return WRITTEN, False


def _agrees(kernel: Kernel, case: Case) -> bool:
    """With what is written out, on a small case: units of the log-sum-exp, what the device and this
    torch take. On a device the host waits, once for each case."""
    heads, rows = (2 if case.grouped else 4), 2 * ALIGNED
    keys = rows if case.square else rows - ALIGNED // 2

    def draw(heads: int, rows: int, width: int, phase: float) -> Tensor:
        at = torch.arange(heads * rows * width, device=case.device, dtype=torch.float32)
        return (at * 0.37 + phase).sin().view(1, heads, rows, width).to(case.dtype)

    q, g = draw(4, rows, case.d, 0.0), draw(4, rows, case.dv, 1.0)
    k, v = draw(heads, keys, case.d, 2.0), draw(heads, keys, case.dv, 3.0)
    mask = None
    if case.masked:
        mask = draw(1, rows, keys, 4.0)
        mask = mask.masked_fill(draw(1, rows, keys, 5.0) < -0.5, -torch.inf)
    view = View(case.causal, mask, scale=0.3)
    full = repeated(k, 4 // heads), repeated(v, 4 // heads)
    out, lse = WRITTEN.forward(q, *full, view)
    dq, dk, dv = WRITTEN.backward(g, q, *full, out, lse, view)
    wanted = (out, lse, dq, summed(dk, 4 // heads), summed(dv, 4 // heads))
    near = {torch.float64: 1e-9, torch.float32: 1e-4}.get(case.dtype, 3e-2)
    try:
        got = (*kernel.forward(q, k, v, view), *kernel.backward(g, q, k, v, out, lse, view))
        agrees = all(
            a.shape == b.shape and torch.allclose(a.to(b.dtype), b, rtol=near, atol=near)
            for a, b in zip(got, wanted)
        )
    except RuntimeError as e:
        log.debug("attention: %s does not take %s: %s", kernel.name, case, e)
        return False
    if not agrees:
        log.debug("attention: %s is not what is written out for %s", kernel.name, case)
    return agrees


def repeated(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def summed(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.unflatten(1, (-1, groups)).sum(2)


def _seen(mask: Tensor | None, lse: Tensor) -> Tensor:
    """-inf for what sees no key."""
    return lse if mask is None else lse.masked_fill(_sees_none(mask), -torch.inf)


def _sees_none(mask: Tensor) -> Tensor:
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return ~seen.any(-1)


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)


def _on_cpu(case: Case) -> bool:
    return case.device.type == "cpu" and case.d == case.dv


def _cpu(q: Tensor, k: Tensor, v: Tensor, b: View) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, b.causal, attn_mask=_additive(b.mask, q), scale=b.scale
    )
    return out, _seen(b.mask, lse)


def _cpu_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, b: View
) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, out, lse, 0.0, b.causal, attn_mask=_additive(b.mask, q), scale=b.scale
    )


def _for_flash(case: Case) -> bool:
    """FlashAttention 2 of NVIDIA and AMD devices; it hides keys from the last query on, which is
    from the first on where there are as many."""
    heads = case.d == case.dv and case.d % 8 == 0 and case.d <= 256
    hidden = case.masked or (case.causal and not case.square)
    return _on_gpu(case) and case.dtype in HALF and heads and not hidden


def _on_gpu(case: Case) -> bool:
    return case.device.type not in ("cpu", "meta")


def _flash(q: Tensor, k: Tensor, v: Tensor, b: View) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, b.causal, False, scale=b.scale
    )
    return out, lse


def _flash_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, b: View
) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # nothing is dropped
    return aten._scaled_dot_product_flash_attention_backward(
        *(g, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, b.causal, seed, seed),
        scale=b.scale,
    )


def _for_efficient(case: Case) -> bool:
    """Of NVIDIA and AMD devices, with a mask that is added."""
    unit = 8 if case.dtype in HALF else 4
    fits = case.d % unit == 0 and case.dv % unit == 0
    return _on_gpu(case) and case.dtype in (*HALF, torch.float32) and fits and not case.grouped


def _bias(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """[b, hq, n, m], each row begins where the kernel wants it."""
    added = _additive(mask, q)
    if added is None:
        return None
    rows, keys = q.shape[2], k.shape[2]
    room = added.new_empty((*added.shape[:2], rows, -(-keys // ALIGNED) * ALIGNED))[..., :keys]
    room.copy_(added.expand_as(room))
    return room.expand(*q.shape[:3], keys)


def _efficient(q: Tensor, k: Tensor, v: Tensor, b: View) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q, k, v, _bias(q, k, b.mask), True, 0.0, b.causal, scale=b.scale
    )
    lse = lse[..., : q.shape[2]]
    if b.mask is None:
        return out, lse
    none = _sees_none(b.mask)
    return out.masked_fill(none.unsqueeze(-1), 0.0), lse.masked_fill(none, -torch.inf)


def _efficient_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, b: View
) -> tuple[Tensor, Tensor, Tensor]:
    missing = -lse.shape[-1] % LSE_ROWS
    lse = torch.nn.functional.pad(lse, (0, missing), value=torch.inf)
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # nothing is dropped
    wanted = [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(
        *(g, q, k, v, _bias(q, k, b.mask), out, lse, seed, seed, 0.0, wanted, b.causal),
        scale=b.scale,
    )[:3]


def _tiles(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Rows of queries whose scores are alive together."""
    rows = max(TILE // max(q.shape[0] * q.shape[1] * k.shape[2], 1), 1)
    for start in range(0, q.shape[2], rows):
        yield slice(start, min(start + rows, q.shape[2]))


def _written(q: Tensor, k: Tensor, v: Tensor, b: View) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(wide), v.to(wide)
    outs, lses = [], []
    for at in _tiles(q, k):
        tile = b.rows(at)
        scores = _masked(modified(b.score, _scores(q[:, :, at].to(wide), k, b.scale)), tile)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - finite(lse, b.top).unsqueeze(-1))
        outs.append((_dropped(weights, tile.factors) @ v).to(q.dtype))
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))


def _written_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, b: View
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(wide), v.to(wide)
    dq, dk, dv = torch.empty_like(q, dtype=wide), torch.zeros_like(k), torch.zeros_like(v)
    for at in _tiles(q, k):
        tile = b.rows(at)
        q_t, g_t, out_t = (x[:, :, at].to(wide) for x in (q, g, out))
        scores = _scores(q_t, k, b.scale)
        weights = torch.exp(_masked(modified(b.score, scores), tile) - lse[:, :, at].unsqueeze(-1))
        dv += _dropped(weights, tile.factors).transpose(-1, -2) @ g_t
        dw = _dropped(g_t @ v.transpose(-1, -2), tile.factors)
        ds = weights * (dw - (g_t * out_t).sum(-1, keepdim=True))
        if tile.added is not None:
            tile.added.add_(ds.sum_to_size(tile.added.shape))
        di = pulled_back(b.score, scores, ds)
        dq[:, :, at] = (di @ k) * b.scale
        dk += (di.transpose(-1, -2) @ q_t) * b.scale
    return dq, dk, dv


def _dropped(x: Tensor, factors: Tensor | None) -> Tensor:
    return x if factors is None else x * factors


def finite(lse: Tensor, top: Tensor | None = None) -> Tensor:
    """Zero for what sees no key, so that its weights are zero; with a top it is NaN, as the
    model's."""
    return lse if top is not None else lse.masked_fill(lse == -torch.inf, 0.0)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q @ k.transpose(-1, -2)) * scale


def _masked(scores: Tensor, b: View) -> Tensor:
    if b.causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(b.first)
        scores = scores.masked_fill(~keep, -torch.inf)
    mask = _additive(b.mask, scores)
    scores = scores if mask is None else scores + mask
    return scores if b.top is None else scores - b.top.to(scores.dtype)


WRITTEN = Kernel("written out", lambda case: True, _written, _written_backward)
CPU = Kernel("CPU flash", _on_cpu, _cpu, _cpu_backward)
KERNELS = (
    CPU,
    Kernel("flash", _for_flash, _flash, _flash_backward),
    Kernel("memory-efficient", _for_efficient, _efficient, _efficient_backward),
)
