"""The models of `tests.support.scripts`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.support.scripts import IGNORED, Script

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "squared relu": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}


class PlainRMS(nn.Module):
    """A norm by hand, its weight around one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1 + self.weight)


def norm(kind: str, width: int) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(width)
    return nn.RMSNorm(width, eps=1e-5) if kind == "rms" else PlainRMS(width)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    if rotary is None:
        return x
    cos, sin = rotary
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    def __init__(self, s: Script) -> None:
        super().__init__()
        self.s = s
        heads, kv, width = s.heads
        self.widths = width, width, width + 2 * (s.extra == "wide values")
        self.sizes = [n * w for n, w in zip((heads, kv, kv), self.widths)]
        sizes = [sum(self.sizes)] if s.fused else self.sizes
        self.into = nn.ModuleList(nn.Linear(s.hidden, n, s.bias) for n in sizes)
        self.out = nn.Linear(heads * self.widths[2], s.hidden, s.bias)
        kinds = {"none": None, "each": (width, width), "all": self.sizes[:2]}[s.head_norm]
        self.norms = nn.ModuleList(norm(s.norms[0], n) for n in kinds or ())
        self.gate = nn.Linear(s.hidden, heads * width, s.bias) if s.extra == "gate" else None
        self.bias = nn.Embedding(7, heads) if s.mask == "bias" else None

    def biased(self, mask: Tensor | None, x: Tensor) -> Tensor | None:
        """A mask that differs by head: by distance, or looked up by it."""
        at = torch.arange(x.shape[1])
        distance = at[:, None] - at[None, :]
        if self.s.mask == "alibi":
            slopes = 0.5 ** torch.arange(1, 1 + self.s.heads[0])
            bias = (-slopes[:, None, None] * distance).to(x.dtype)
        elif self.bias is not None:
            bias = self.bias(distance.clamp(-3, 3) + 3).permute(2, 0, 1)
        else:
            return mask
        return bias[None].masked_fill(distance < 0, -torch.inf)

    def forward(
        self, x: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        s = self.s
        heads, kv, _ = s.heads
        mask = self.biased(mask, x)
        made = [w(x) for w in self.into]
        q, k, v = made if len(made) == 3 else made[0].split(self.sizes, -1)
        if s.head_norm == "all":
            q, k = self.norms[0](q), self.norms[1](k)
        q, k, v = (t.unflatten(-1, (-1, w)) for t, w in zip((q, k, v), self.widths))
        if s.head_norm == "each":
            q, k = self.norms[0](q), self.norms[1](k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = rotate(q, rotary), rotate(k, rotary)
        if s.groups == "repeat":
            k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
        elif s.groups == "expand":
            k, v = (t[:, :, None].expand(-1, -1, heads // kv, -1, -1).flatten(1, 2) for t in (k, v))
        p = s.dropout if self.training else 0.0
        grouped = s.groups == "flag" and kv != heads
        y = F.scaled_dot_product_attention(
            q, k, v, mask, p, is_causal=s.mask == "causal", enable_gqa=grouped
        )
        y = y.transpose(1, 2).flatten(2)
        y = y if self.gate is None else y * torch.sigmoid(self.gate(x))
        return self.out(y)


class Torchs(nn.Module):
    """torch's own module, with a mask that is True where it hides."""

    def __init__(self, s: Script) -> None:
        super().__init__()
        self.s, first = s, s.fused
        self.inner = nn.MultiheadAttention(
            s.hidden, 2, s.dropout, bias=s.bias, batch_first=not first
        )

    def forward(self, x: Tensor, mask: Tensor | None, rotary: Any) -> Tensor:
        at = torch.arange(x.shape[1])
        later = at[None, :] > at[:, None] if self.s.mask != "none" else None
        x = x if self.inner.batch_first else x.transpose(0, 1)
        y, _ = self.inner(x, x, x, attn_mask=later, need_weights=False)
        return y if self.inner.batch_first else y.transpose(0, 1)


class Experts(nn.Module):
    """A dense mixture of two."""

    def __init__(self, s: Script) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(s.hidden, 2), nn.ModuleList([MLP(s), MLP(s)])

    def forward(self, x: Tensor) -> Tensor:
        parts = self.router(x).softmax(-1)
        return sum(parts[..., i : i + 1] * e(x) for i, e in enumerate(self.experts))  # pyright: ignore[reportReturnType]


class MLP(nn.Module):
    def __init__(self, s: Script) -> None:
        super().__init__()
        self.s, self.activation = s, ACTIVATIONS[s.activation]
        count = 2 if s.gated else 1
        widths = [count * s.ffn] if s.fused else count * [s.ffn]
        self.up = nn.ModuleList(nn.Linear(s.hidden, n, s.bias) for n in widths)
        self.down = nn.Linear(s.ffn, s.hidden, s.bias)
        self.norm = norm(s.norms[0], s.ffn) if s.extra == "middle norm" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.s.extra == "shift":  # half of what a token sees is of the one before
            before = F.pad(x, (0, 0, 1, 0))[:, :-1]
            x = 0.5 * (x + before)
        made = [w(x) for w in self.up]
        made = list(made[0].chunk(2, -1)) if self.s.gated and len(made) == 1 else made
        h = self.activation(made[0])
        h = h * made[1] if self.s.gated else h
        return self.down(F.dropout(self.norm(h), self.s.dropout, self.training))


class Block(nn.Module):
    def __init__(self, s: Script) -> None:
        super().__init__()
        self.s = s
        self.attention = Torchs(s) if s.extra == "module" else Attention(s)
        self.mlp = Experts(s) if s.extra == "experts" else MLP(s)
        count = {"pre": 2, "post": 1 if s.parallel else 2, "sandwich": 4}[s.norms[1]]
        self.norms = nn.ModuleList(norm(s.norms[0], s.hidden) for _ in range(count))

    def feed(self, x: Tensor) -> Tensor:
        if self.s.checkpointed == "mlp":
            return checkpoint(self.mlp, x, use_reentrant=False)  # type: ignore[return-value]
        return self.mlp(x)

    def forward(self, x: Tensor, mask: Tensor | None, rotary: Any) -> Tensor:
        s, first, second = self.s, self.norms[0], self.norms[-1]
        drop = lambda y: F.dropout(y, s.dropout, self.training)  # noqa: E731
        if s.norms[1] == "post":
            if s.parallel:
                return first(x + drop(self.attention(x, mask, rotary) + self.feed(x)))
            x = first(x + drop(self.attention(x, mask, rotary)))
            return second(x + drop(self.feed(x)))
        after = list(self.norms)[1:3] if s.norms[1] == "sandwich" else [nn.Identity()] * 2
        attended = after[0](drop(self.attention(first(x), mask, rotary)))
        if s.parallel:
            return x + attended + after[1](drop(self.feed(second(x))))
        x = x + attended
        return x + after[1](drop(self.feed(second(x))))


class Model(nn.Module):
    """forward(tokens, keep, labels); keep: [B, S], which tokens are no padding."""

    def __init__(self, s: Script) -> None:
        super().__init__()
        self.s, self.words = s, nn.Embedding(s.vocabulary, s.hidden)
        self.places = nn.Embedding(16, s.hidden) if s.positions == "learned" else None
        block = Block(s)
        self.blocks = nn.ModuleList(
            block if s.shared or not i else Block(s) for i in range(s.layers)
        )
        self.norm = norm(s.norms[0], s.hidden) if s.norms[1] != "post" else nn.Identity()
        self.head = nn.Linear(s.hidden, s.vocabulary, s.bias and not s.tied)
        if s.tied:
            self.head.weight = self.words.weight
        self.other = (
            nn.Linear(s.hidden, 7, s.bias)
            if s.extra == "second head" and s.loss != "outside"
            else None
        )
        count = s.heads[2] // 2
        own = s.extra == "own frequencies" and s.positions == "rotary"
        self.frequencies = nn.Parameter(torch.rand(count)) if own else None

    def mask(self, x: Tensor, keep: Tensor) -> Tensor | None:
        at = torch.arange(x.shape[1])
        causal = at[None, :] <= at[:, None]
        if self.s.mask == "tril":
            return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if self.s.mask == "window":
            return causal & (at[:, None] - at[None, :] < 3)
        if self.s.mask == "padding":
            return keep[:, None, None, :]
        both = causal & keep[:, None, None, :]
        if self.s.mask == "causal padding":
            return both
        if self.s.mask == "additive":
            return torch.zeros_like(both, dtype=x.dtype).masked_fill(~both, -1e9)
        return None

    def logits(self, x: Tensor) -> Tensor:
        if self.s.extra == "rows first" and self.s.target == "token":
            return self.head(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x)

    def rotary(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin, [S, width], exact before they are rounded."""
        if self.s.positions != "rotary":
            return None
        width = self.s.heads[2]
        frequencies = 10.0 ** -torch.arange(0, 1, 2 / width, dtype=torch.float64)
        if self.frequencies is not None:
            frequencies = self.frequencies
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def forward(self, tokens: Tensor, keep: Tensor, labels: Tensor) -> Any:
        s, x = self.s, self.words(tokens)
        if self.places is not None:
            x = x + self.places(torch.arange(tokens.shape[1]))
        if s.extra == "scale":
            x = x * s.hidden**0.5
        x = F.dropout(x, s.dropout, self.training)
        mask, rotary = self.mask(x, keep), self.rotary(x)
        for block in self.blocks:
            if s.checkpointed == "block":
                x = checkpoint(block, x, mask, rotary, use_reentrant=False)
            else:
                x = block(x, mask, rotary)
        x = self.norm(x)
        if s.target != "token":
            x = x[:, -1] if s.target == "last" else x.mean(1)
        logits = self.logits(x)
        if s.extra == "cap":
            logits = 3.0 * torch.tanh(logits / 3.0)
        if s.loss == "outside":
            return logits
        loss = loss_of(s, logits, labels)
        if self.other is not None:
            few = torch.where(labels == IGNORED, IGNORED, labels % 7)
            loss = loss + 0.5 * loss_of(s, self.other(x), few)
        return (loss, logits) if s.loss == "beside" else loss


def loss_of(s: Script, logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    if s.target != "token":
        return F.cross_entropy(logits, labels[:, 0], label_smoothing=s.smoothing)
    if s.shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.flatten(0, 1)
    names = {"mean": "mean", "weighted": "none", "counted": "sum"}
    given = {"label_smoothing": s.smoothing, "reduction": names[s.mean]}
    loss = F.cross_entropy(flat, labels.flatten(), **given)
    if s.mean == "weighted":
        weights = 1.0 / (1 + labels.flatten().clamp(min=0)).to(loss.dtype)
        loss = (loss * weights).sum() / weights.sum()
    elif s.mean == "counted":
        loss = loss / (labels != IGNORED).sum()
    if s.extra == "z loss":
        loss = loss + 1e-2 * flat.logsumexp(-1).square().mean()
    return loss


def make(s: Script, draw: int = 0) -> Model:
    """Norms and biases random too."""
    torch.manual_seed(draw)
    model = Model(s).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
    parts = {"words": ["words"], "mlp": [".mlp."], "attention": [".attention."], "norms": ["norm"]}
    for n, p in model.named_parameters():
        p.requires_grad_(not any(part in n for part in parts.get(s.frozen, ())))
    return model.to(s.dtype)
