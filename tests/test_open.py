"""What does not hold yet, each as a strict xfail with its reason: the list is where to go on."""

from __future__ import annotations

import pytest
import torch

import tspc
from examples.llama_like import LlamaLike
from tspc.check import Simulated, simulated_backend

TOKENS = torch.zeros(2, 12, dtype=torch.long)


class Trimmed(LlamaLike):
    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        logits = super().forward(tokens)
        return logits[:, :-1].logsumexp(-1).sum()


@pytest.mark.xfail(strict=True, reason="a trimmed sequence has no window: it is gathered")
def test_a_trimmed_sequence_stays_cut() -> None:
    made: list[Simulated] = []
    torch.compile(Trimmed(layers=1), backend=simulated_backend(2, None, made))(TOKENS)
    assert not made[0].rewritten.typed.fallbacks


@pytest.mark.xfail(
    strict=True, reason="K/V heads fewer than the ranks are padded, not duplicated on a grid"
)
def test_kv_heads_fewer_than_ranks_are_not_padded() -> None:
    plan = tspc.plan(LlamaLike(layers=1, heads=8, kv_heads=2), (TOKENS,), ranks=4)
    (fold,) = (
        n.kwargs["fold"] for n in plan.rewritten.folds if "attention" in n.kwargs["fold"].name
    )
    assert fold.size % (fold.units * 4) == 0
