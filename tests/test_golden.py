"""Program texts that a person has read; `--update-golden` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import tspc
from examples.gpt2_like import GPT2Like
from examples.llama_like import LlamaLike

GOLDEN = Path(__file__).parent / "golden"


def qwen3() -> torch.nn.Module:
    import transformers as t

    config = t.Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    return t.Qwen3ForCausalLM(config)


CASES = {
    "llama_like": lambda: (LlamaLike(layers=1), "tokens"),
    "gpt2_like": lambda: (GPT2Like(layers=1, positions=4096), "tokens"),
    "qwen3": lambda: (qwen3(), "input_ids"),
}


@pytest.mark.parametrize("name", CASES)
def test_plan_text(name: str, request: pytest.FixtureRequest) -> None:
    model, ids = CASES[name]()
    tokens = torch.zeros(2, 4096, dtype=torch.long)
    text = str(tspc.plan(model, (), {ids: tokens, "labels": tokens}, ranks=4)) + "\n"
    text = re.sub(r"(transformers/\S+\.py):\d+", r"\1", text)  # lines move with its version
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
    assert text.count("fold[ring]") == 2
    # without grouped K/V their exchange alone (6n) is more than the tokens of stationary (5n)
    assert ("fold[broadcast]" if name != "gpt2_like" else "fold[stationary]") in text
