"""The example models alone, on one device: losses are those of chance, every gradient is there and
finite."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn

from examples.gpt2_like import GPT2Like
from examples.llama_like import LlamaLike
from examples.measure import peak_of, state_bytes

MODELS = {
    "gqa": lambda: LlamaLike(layers=2, heads=4, kv_heads=2),
    "mha": lambda: LlamaLike(layers=2, heads=4, kv_heads=4),
    "gpt2": lambda: GPT2Like(layers=2),
    "gpt2 with dropout": lambda: GPT2Like(layers=2, dropout=0.1),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


@pytest.mark.parametrize("name", MODELS)
def test_trains_on_one_device(name: str) -> None:
    model = make(name)
    tokens = torch.randint(0, 256, (2, 33))
    loss = model(tokens, tokens)
    loss.backward()
    assert loss.dim() == 0 and math.isfinite(loss.item())
    for n, p in model.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()), n
    assert model(tokens).shape == (2, 33, 256)


@pytest.mark.parametrize("name", ["gqa", "mha", "gpt2"])
def test_is_causal(name: str) -> None:
    model = make(name)
    tokens = torch.randint(0, 256, (1, 16))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 256
    torch.testing.assert_close(model(tokens)[:, :9], model(changed)[:, :9])
    assert not torch.allclose(model(tokens)[:, 9:], model(changed)[:, 9:])


def test_loss_is_of_the_next_token() -> None:
    model = make("gqa")
    tokens = torch.randint(0, 256, (2, 16))
    logits = model(tokens)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    torch.testing.assert_close(model(tokens, tokens), expected)


def test_memory_is_counted() -> None:
    def step() -> torch.Tensor:
        torch.empty(2**20)
        return torch.empty(2**18)

    peak, alive, kept = peak_of(step)
    assert kept.numel() == 2**18
    assert alive == 4 * 2**18 and peak >= 4 * 2**20


def test_state_is_counted() -> None:
    model = make("gqa")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()
    size = 4 * sum(p.numel() for p in model.parameters())
    found = state_bytes(model, optimizer)
    assert found["parameters"] == found["gradients"] == size
    assert 2 * size <= found["optimizer"] <= 2 * size + 8 * len(list(model.parameters()))
