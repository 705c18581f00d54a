"""Schemas, fakes and autograd formulas of tspc's ops. `runtime` registers what they do on ranks."""

from __future__ import annotations

import torch

LIB = torch.library.Library("tspc", "FRAGMENT")

# logits[..., labels] of the last dim, zero where a label lies outside [offset, offset + width)
LIB.define("pick(Tensor logits, Tensor labels, Tensor? offset=None) -> Tensor")


def pick(logits: torch.Tensor, labels: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
    """The logit of each label: [..., v], [...] -> [...]; labels outside of this shard's range give zero."""
    index = labels if offset is None else labels - offset
    inside = (index >= 0) & (index < logits.shape[-1])
    picked = logits.gather(-1, torch.where(inside, index, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(inside, picked, 0.0)


LIB.impl("pick", pick, "CompositeImplicitAutograd")
