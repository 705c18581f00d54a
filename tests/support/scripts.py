"""Training scripts as data: a small grammar of models and of what is done around them.

`Script` is one of them, `batches` what its model is called with; `tests.support.script_models`
makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

ACTIVATIONS = ("gelu", "tanh gelu", "silu", "relu", "squared relu", "sigmoid")
EXTRAS = (
    "cap",
    "z loss",
    "gate",
    "shift",
    "middle norm",
    "scale",
    "own frequencies",
    "rows first",
    "experts",
    "wide values",
    "second head",
    "module",
)
MASKS = (
    "causal",
    "none",
    "padding",
    "causal padding",
    "additive",
    "window",
    "tril",
    "alibi",
    "bias",
)
IGNORED = -100


@dataclass(frozen=True)
class Script:
    """heads: (of queries, of keys, width of each). groups: how few keys meet many queries. norms:
    (kind, where). fused: q, k and v of one weight, gate and up of one. shared: all layers are one.
    extra: one more thing in the model. loss: inside of the model, alone or beside the logits, or
    outside of it. target: every token, or a class of the whole sequence. frozen: which parameters
    want no gradient. lengths: of the two steps.
    """

    heads: tuple[int, int, int]
    hidden: int
    ffn: int
    vocabulary: int
    layers: int
    shared: bool
    extra: str
    positions: str
    norms: tuple[str, str]
    head_norm: str
    groups: str
    bias: bool
    fused: bool
    gated: bool
    activation: str
    parallel: bool
    tied: bool
    loss: str
    target: str
    shift: bool
    smoothing: float
    mean: str
    mask: str
    dropout: float
    frozen: str
    checkpointed: str
    lengths: tuple[int, int]
    batch: int
    ranks: int
    schedule: str
    budget: Any
    layout: str
    dtype: torch.dtype
    dynamic: bool | None
    accumulation: int
    clip: bool
    adam: bool

    @property
    def options(self) -> dict[str, Any]:
        return {"schedule": self.schedule, "memory_budget": self.budget, "layout": self.layout}


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """What takes long to trace is drawn rarely: two layers, a second length, dropout."""

    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    def rarely(usual: Any, other: Any) -> Any:
        return one(*(usual,) * 6, other)

    dtype = one(torch.float64, torch.float64, torch.float64, torch.bfloat16)
    length, other = draw(st.integers(2, 13)), draw(st.integers(2, 13))
    layers = rarely(1, 2)
    drops = dtype == torch.float64 and layers == 1
    return Script(
        heads=one((2, 2, 4), (3, 3, 4), (4, 2, 2), (4, 1, 4), (6, 3, 2), (3, 1, 2), (6, 2, 2)),
        hidden=one(8, 12),
        ffn=one(8, 10, 13),
        vocabulary=one(11, 16, 23),
        layers=layers,
        shared=layers > 1 and one(False, True),
        extra=one("none", "none", *EXTRAS),
        positions=one("none", "learned", "rotary"),
        norms=(one("layer", "rms", "plain rms"), one("pre", "post", "sandwich")),
        head_norm=one("none", "each", "all"),
        groups=one("flag", "repeat", "expand"),
        bias=one(False, True),
        fused=one(False, True),
        gated=one(False, True),
        activation=one(*ACTIVATIONS),
        parallel=one(False, False, True),
        tied=one(False, True),
        loss=one("inside", "inside", "beside", "outside"),
        target=one("token", "token", "token", "token", "token", "last", "mean"),
        shift=one(False, True),
        smoothing=one(0.0, 0.0, 0.1),
        mean=one("mean", "mean", "weighted", "counted"),
        mask=one("causal", *MASKS),
        dropout=rarely(0.0, 0.3) if drops else 0.0,
        frozen=one("none", "none", "none", "words", "mlp", "attention", "norms"),
        checkpointed=one("no", "no", "block", "mlp"),
        lengths=(length, rarely(length, other)),
        batch=one(1, 2, 3),
        ranks=one(2, 3, 4),
        schedule=one("auto", "ring", "broadcast", "gather", "stationary"),
        budget=one("max-speed", "min", 0.5),
        layout=one("auto", "auto", "contiguous", "zigzag"),
        dtype=dtype,
        dynamic=rarely(None, True),
        accumulation=one(1, 1, 2),
        clip=one(False, True),
        adam=one(False, True),
    )


def batches(s: Script, seed: int) -> list[list[tuple[Tensor, ...]]]:
    """(tokens, keep, labels) of each micro-batch of each step; the first two tokens are no
    padding."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for length in s.lengths:
        micro = []
        for _ in range(s.accumulation):
            size = (s.batch, length)
            tokens = torch.randint(0, s.vocabulary, size, generator=generator)
            keep = torch.rand(size, generator=generator) > 0.3
            keep[:, :2] = True
            labels = tokens.masked_fill(~keep, IGNORED) if "padding" in s.mask else tokens
            micro.append((tokens, keep, labels))
        out.append(micro)
    return out
