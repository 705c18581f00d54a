"""Small models of the parity tests, by name; all in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from examples.gpt2_like import GPT2Like
from examples.llama_like import LlamaLike

VOCABULARY = 187


def llama_like(heads: int, kv_heads: int, layers: int = 2) -> nn.Module:
    return LlamaLike(VOCABULARY, 8 * heads, layers, heads, kv_heads, 50)


def gpt2_like(heads: int, kv_heads: int, layers: int = 2) -> nn.Module:
    return GPT2Like(VOCABULARY, 8 * heads, layers, heads, 64)


def hf_llama(heads: int, kv_heads: int, layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_sizes(heads, kv_heads, layers)))


def hf_qwen3(heads: int, kv_heads: int, layers: int = 2) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_sizes(heads, kv_heads, layers)))


def _sizes(heads: int, kv_heads: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 8 * heads,
        "intermediate_size": 50,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
    }


MODELS: dict[str, Callable[..., nn.Module]] = {
    "llama_like": llama_like,
    "gpt2_like": gpt2_like,
    "hf_llama": hf_llama,
    "hf_qwen3": hf_qwen3,
}


def make(name: str, heads: int = 4, kv_heads: int = 2, seed: int = 0, layers: int = 2) -> nn.Module:
    """The model with random weights in float64; norms and biases random too, so that nothing
    hides."""
    torch.manual_seed(seed)
    model = MODELS[name](heads, kv_heads, layers).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def call(name: str, tokens: torch.Tensor, loss: bool) -> dict[str, torch.Tensor]:
    """Keyword arguments of a call, with the loss inside of the model or not."""
    ids = "input_ids" if name.startswith("hf_") else "tokens"
    return {ids: tokens, "labels": tokens.clone()} if loss else {ids: tokens}


def tokens_of(length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def loss_of(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.loss


def whole(x: torch.Tensor) -> torch.Tensor:
    """A collective for a DTensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def strided(x: torch.Tensor) -> torch.Tensor:
    """Equal, with its dims laid out the other way round and gaps between its elements."""
    back = tuple(reversed(range(x.dim())))
    out = x.new_zeros(*x.permute(back).shape, 2)[..., 0].permute(back)
    return out.copy_(x)
