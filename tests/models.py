"""Small models of the parity tests, by name; all in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from examples.gpt2_like import GPT2Like
from examples.llama_like import LlamaLike

VOCABULARY = 187


def llama_like(heads: int, kv_heads: int) -> nn.Module:
    return LlamaLike(VOCABULARY, 8 * heads, 2, heads, kv_heads, 50)


def gpt2_like(heads: int, kv_heads: int) -> nn.Module:
    return GPT2Like(VOCABULARY, 8 * heads, 2, heads, 64)


def hf_llama(heads: int, kv_heads: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_sizes(heads, kv_heads)))


def hf_qwen3(heads: int, kv_heads: int) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_sizes(heads, kv_heads)))


def _sizes(heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 8 * heads,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
    }


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "llama_like": llama_like,
    "gpt2_like": gpt2_like,
    "hf_llama": hf_llama,
    "hf_qwen3": hf_qwen3,
}


def make(name: str, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> nn.Module:
    """The model with random weights in float64; norms and biases random too, so that nothing
    hides."""
    torch.manual_seed(seed)
    model = MODELS[name](heads, kv_heads).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def call(name: str, tokens: torch.Tensor, loss: bool) -> dict[str, torch.Tensor]:
    """Keyword arguments of a call, with the loss inside of the model or not."""
    ids = "input_ids" if name.startswith("hf_") else "tokens"
    return {ids: tokens, "labels": tokens.clone()} if loss else {ids: tokens}
