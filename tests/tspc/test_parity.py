"""Simulated ranks against one device: what `tspc.verify` compares, and what it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from transformers.modeling_outputs import CausalLMOutput

import tspc
from tspc import parity
from tspc.backend import simulated


class Counted(nn.Module):
    """Writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        y = self.down(torch.tanh(self.up(x)))
        return {"loss": y.square().mean(), "y": y}


def test_what_is_compared() -> None:
    model, x = Counted().double(), torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    r = tspc.verify(model, (x,), ranks=2)
    assert set(r.errors) == {"output", "gradient of", "input gradient", "parameter", "buffer"}
    assert r.worst < 1e-12 and set(r.errors["buffer"]) == {"calls"}
    assert set(r.errors["gradient of"]) == {n for n, _ in model.named_parameters()}
    assert model.calls == 0 and model.up.weight.grad is None  # as it was


def test_what_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assembled = simulated._whole_gradients
    monkeypatch.setattr(
        simulated,
        "_whole_gradients",
        lambda *a: [g if g is None else g * 1.01 for g in assembled(*a)],
    )
    model = Counted().double()
    with pytest.raises(tspc.ParityError, match=r"2 ranks differ .* gradient of up\.weight: 1"):
        tspc.verify(model, (torch.randn(2, 6, 8, dtype=torch.float64),))


def test_what_a_model_returns_is_plain() -> None:
    x = torch.ones(2, 4, 4)
    plain = parity._plain(CausalLMOutput(loss=torch.ones(())))
    assert isinstance(plain, dict) and set(plain) == {"loss"}
    assert parity._plain([x]) == [x]
