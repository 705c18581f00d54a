"""Program texts that a person has read; `--update-golden` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import tspc
from examples.gpt2_like import GPT2Like
from examples.llama_like import LlamaLike

LENGTH = 131072
GOLDEN = Path(__file__).parents[1] / "golden"


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
    "gpt2_like": lambda: (GPT2Like(layers=1, positions=LENGTH), "tokens"),
    "qwen3": lambda: (qwen3(), "input_ids"),
}


@pytest.mark.parametrize("name", CASES)
def test_plan_text(name: str, request: pytest.FixtureRequest) -> None:
    model, ids = CASES[name]()
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    inputs = {ids: tokens, "labels": tokens}
    text = str(tspc.plan(model, (), inputs, ranks=4, options={"hardware": "h100"})) + "\n"
    text = re.sub(r"(transformers/\S+\.py):\d+", r"\1", text)  # lines move with its version
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
    assert text.count("fold[ring]") == 2
    assert text.count("fold[broadcast]") == 1
