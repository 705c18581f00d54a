"""Tiny configurations of the architectures that people train, by name: a model and the keyword
arguments of one call.

`zoo()[name](length, batch)` -> (model with random weights, kwargs with labels). Nothing is
downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

WORDS, HIDDEN, HEADS, KV, DIM, FFN, LAYERS = 187, 48, 6, 2, 8, 50, 2
EXPERT, POSITIONS = 20, 128
MEASURED = {  # memory is measured at these
    "WORDS": 2048,
    "HIDDEN": 256,
    "HEADS": 8,
    "KV": 4,
    "DIM": 32,
    "FFN": 1024,
    "LAYERS": 4,
    "EXPERT": 256,
    "POSITIONS": 512,
}
Made = tuple[nn.Module, dict[str, Any]]
ZOO: dict[str, Callable[[int, int], Made]] = {}


@contextmanager
def sized(size: str) -> Iterator[None]:
    """Models are made, and run, at size "tiny" or "measured" in here."""
    names = globals()
    before = {n: names[n] for n in MEASURED}
    names.update({"tiny": before, "measured": MEASURED}[size])
    try:
        yield
    finally:
        names.update(before)


def _base(**more: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return sizes | more


def _grouped(**more: Any) -> dict[str, Any]:
    return _base(num_key_value_heads=KV, head_dim=DIM, **more)


def tokens(length: int, batch: int, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, WORDS, (batch, length), generator=generator)


def _language(name: str, config: str, model: str, make: Callable[[], dict[str, Any]]) -> None:
    def build(length: int, batch: int) -> Made:
        import transformers as t

        made = getattr(t, model)(getattr(t, config)(**make()))
        ids = tokens(length, batch)
        return made, {"input_ids": ids, "labels": ids.clone()}

    ZOO[name] = build


def _causal(name: str, prefix: str, make: Callable[[], dict[str, Any]]) -> None:
    _language(name, f"{prefix}Config", f"{prefix}ForCausalLM", make)


_causal("llama", "Llama", _grouped)
_causal("qwen2", "Qwen2", lambda: _base(num_key_value_heads=KV))
_causal("qwen3", "Qwen3", _grouped)
_causal("mistral", "Mistral", lambda: _grouped(sliding_window=7))
_language(
    "gemma3",
    "Gemma3TextConfig",
    "Gemma3ForCausalLM",
    lambda: _grouped(
        sliding_window=7, layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2)
    ),
)
_causal("gpt_neox", "GPTNeoX", lambda: _base(hidden_dropout=0.0, attention_dropout=0.0))
_causal("phi", "Phi", lambda: _base(num_key_value_heads=HEADS, resid_pdrop=0.0))
_causal("phi3", "Phi3", lambda: _base(num_key_value_heads=KV, resid_pdrop=0.0))
_causal("olmo2", "Olmo2", lambda: _base(num_key_value_heads=KV))
_causal("smollm3", "SmolLM3", lambda: _base(num_key_value_heads=KV))
_causal(
    "opt",
    "OPT",
    lambda: {
        "vocab_size": WORDS,
        "hidden_size": HIDDEN,
        "ffn_dim": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "word_embed_proj_dim": HIDDEN,
        "dropout": 0.0,
        "pad_token_id": 1,
    },
)
_causal(
    "deepseek_v3",
    "DeepseekV3",
    lambda: _base(
        num_key_value_heads=HEADS,
        q_lora_rank=2 * DIM,
        kv_lora_rank=2 * DIM,
        qk_rope_head_dim=DIM,
        qk_nope_head_dim=DIM,
        v_head_dim=DIM,
        moe_intermediate_size=EXPERT,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        experts_implementation="batched_mm",
    ),
)
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
_causal("mixtral", "Mixtral", lambda: _grouped(num_local_experts=4, **EXPERTS))
_causal(
    "qwen3_moe",
    "Qwen3Moe",
    lambda: _grouped(num_experts=4, moe_intermediate_size=EXPERT, **EXPERTS),
)
_causal(
    "gpt_oss",
    "GptOss",
    lambda: _grouped(
        num_local_experts=4,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
        **EXPERTS,
    ),
)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_language("bert", "BertConfig", "BertForMaskedLM", lambda: _base(**NO_DROPOUT))
_language(
    "modernbert",
    "ModernBertConfig",
    "ModernBertForMaskedLM",
    lambda: _base(local_attention=6, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2),
)
_language(
    "albert", "AlbertConfig", "AlbertForMaskedLM", lambda: _base(embedding_size=20, **NO_DROPOUT)
)
_causal("cohere", "Cohere", lambda: _base(num_key_value_heads=KV))
_causal(
    "bloom",
    "Bloom",
    lambda: {
        "vocab_size": WORDS,
        "hidden_size": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
)


def _falcon(**more: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "ffn_hidden_size": FFN,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias": False,
    }
    return sizes | more


_causal("falcon", "Falcon", lambda: _falcon(num_kv_heads=KV, new_decoder_architecture=True))
_causal("falcon_mqa", "Falcon", lambda: _falcon(multi_query=True, new_decoder_architecture=False))
_causal(
    "mamba2",
    "Mamba2",
    lambda: {
        "vocab_size": WORDS,
        "hidden_size": 4 * DIM,
        "num_hidden_layers": LAYERS,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": DIM,
        "n_groups": 2,
        "chunk_size": 8,
    },
)


def made(fn: Callable[[int, int], Made]) -> Callable[[int, int], Made]:
    ZOO[fn.__name__] = fn
    return fn


@made
def gpt2(length: int, batch: int) -> Made:
    import transformers as t

    config = t.GPT2Config(
        vocab_size=WORDS,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=FFN,
        n_positions=POSITIONS,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = t.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # else a log call breaks the graph before the loss
    ids = tokens(length, batch)
    return model, {"input_ids": ids, "labels": ids.clone()}


@made
def vit(length: int, batch: int) -> Made:
    """Images of as many patches as make about `length` tokens with the class token."""
    import transformers as t

    side = max(2, round(length**0.5))
    config = t.ViTConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=4 * side,
        patch_size=4,
        num_labels=11,
        **NO_DROPOUT,
    )
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, 4 * side, 4 * side, generator=generator)
    labels = torch.arange(batch) % 11
    return t.ViTForImageClassification(config), {"pixel_values": pixels, "labels": labels}


@made
def t5(length: int, batch: int) -> Made:
    import transformers as t

    config = t.T5Config(
        vocab_size=WORDS,
        d_model=HIDDEN,
        d_kv=DIM,
        d_ff=FFN,
        num_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    kwargs = {"input_ids": tokens(length, batch), "labels": tokens(length + 4, batch, 1)}
    return t.T5ForConditionalGeneration(config), kwargs


@made
def whisper(length: int, batch: int) -> Made:
    """Mel frames make length tokens of the encoder; as many less 4 words of the decoder."""
    import transformers as t

    config = t.WhisperConfig(
        vocab_size=WORDS,
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN,
        decoder_ffn_dim=FFN,
        num_mel_bins=8,
        max_source_positions=length,
        max_target_positions=POSITIONS,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    generator = torch.Generator().manual_seed(0)
    mel = torch.randn(batch, 8, 2 * length, generator=generator)
    model = t.WhisperForConditionalGeneration(config)
    return model, {"input_features": mel, "labels": tokens(max(2, length - 4), batch, 1)}


@made
def qwen2_vl(length: int, batch: int) -> Made:
    """The language part of a vision-language model, with its positions in three axes."""
    import transformers as t

    config = t.Qwen2VLConfig(
        text_config=_base(
            num_key_value_heads=KV,
            rope_scaling={
                "type": "mrope",
                "mrope_section": [DIM // 4, DIM // 8, DIM // 8],
                "rope_type": "default",
            },
        ),
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 4, "hidden_size": HIDDEN},
        image_token_id=WORDS - 2,
        video_token_id=WORDS - 1,
        vision_start_token_id=WORDS - 4,
        vision_end_token_id=WORDS - 3,
    )
    ids = tokens(length, batch).clamp(max=WORDS - 7)
    model = t.Qwen2VLForConditionalGeneration(config)
    return model, {"input_ids": ids, "labels": ids.clone()}


class NanoGPT(nn.Module):
    """Fused projection split in three, learned positions, tied head, `is_causal`."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, HIDDEN), nn.Embedding(POSITIONS, HIDDEN)
        self.head = nn.Linear(HIDDEN, WORDS, bias=False)
        self.head.weight = self.wte.weight
        self.norm = nn.LayerNorm(HIDDEN)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(HIDDEN),
                    "qkv": nn.Linear(HIDDEN, 3 * HIDDEN),
                    "out": nn.Linear(HIDDEN, HIDDEN),
                    "norm2": nn.LayerNorm(HIDDEN),
                    "up": nn.Linear(HIDDEN, FFN),
                    "down": nn.Linear(FFN, HIDDEN),
                }
            )
            for _ in range(LAYERS)
        )
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        b, s = input_ids.shape
        x = self.wte(input_ids) + self.wpe(torch.arange(s, device=input_ids.device))
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["norm1"](x)).split(HIDDEN, dim=2)
            q, k, v = (t.view(b, s, HEADS, DIM).transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["out"](y.transpose(1, 2).contiguous().view(b, s, HIDDEN))
            x = x + layer["down"](F.gelu(layer["up"](layer["norm2"](x))))
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits.view(-1, WORDS), labels.view(-1), ignore_index=-1)
        return loss, logits


class Titan(nn.Module):
    """Rotary positions as complex numbers, K and V repeated by expand, gated MLP w1 w3 w2."""

    def __init__(self) -> None:
        super().__init__()

        def linear(i: int, o: int) -> nn.Linear:
            return nn.Linear(i, o, bias=False)

        self.embedding, self.norm = nn.Embedding(WORDS, HIDDEN), nn.RMSNorm(HIDDEN)
        self.output = linear(HIDDEN, WORDS)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.RMSNorm(HIDDEN),
                    "wq": linear(HIDDEN, HEADS * DIM),
                    "wk": linear(HIDDEN, KV * DIM),
                    "wv": linear(HIDDEN, KV * DIM),
                    "wo": linear(HEADS * DIM, HIDDEN),
                    "norm2": nn.RMSNorm(HIDDEN),
                    "w1": linear(HIDDEN, FFN),
                    "w3": linear(HIDDEN, FFN),
                    "w2": linear(FFN, HIDDEN),
                }
            )
            for _ in range(LAYERS)
        )
        inverse = 1 / 10000 ** (torch.arange(0, DIM, 2).double() / DIM)
        angles = torch.outer(torch.arange(POSITIONS).double(), inverse)
        self.register_buffer("cis", torch.polar(torch.ones_like(angles), angles))

    @staticmethod
    def rotated(x: torch.Tensor, cis: torch.Tensor) -> torch.Tensor:
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * cis.view(1, z.shape[1], 1, z.shape[-1])).flatten(3)

    @staticmethod
    def repeated(x: torch.Tensor) -> torch.Tensor:
        b, s, heads, d = x.shape
        groups = HEADS // KV
        return x[:, :, :, None, :].expand(b, s, heads, groups, d).reshape(b, s, heads * groups, d)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        b, s = input_ids.shape
        x, cis = self.embedding(input_ids), self.cis[:s]
        for layer in self.layers:
            y = layer["norm1"](x)
            q, k, v = (layer[n](y).view(b, s, -1, DIM) for n in ("wq", "wk", "wv"))
            q, k = self.rotated(q, cis), self.rotated(k, cis)
            q, k, v = (t.transpose(1, 2) for t in (q, self.repeated(k), self.repeated(v)))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["wo"](y.transpose(1, 2).contiguous().view(b, s, -1))
            y = layer["norm2"](x)
            x = x + layer["w2"](F.silu(layer["w1"](y)) * layer["w3"](y))
        return F.cross_entropy(self.output(self.norm(x)).flatten(0, 1), labels.flatten())


@made
def nano_gpt(length: int, batch: int) -> Made:
    ids = tokens(length, batch)
    return NanoGPT(), {"input_ids": ids, "labels": ids.clone()}


@made
def titan(length: int, batch: int) -> Made:
    ids = tokens(length, batch)
    return Titan(), {"input_ids": ids, "labels": ids.clone()}


def packed(length: int, batch: int) -> Made:
    """Documents told by positions that restart, which the library looks for where it has no
    cache."""
    model, kwargs = ZOO["llama"](length, batch)
    kwargs["use_cache"] = False
    at = torch.arange(length)
    cuts = torch.tensor([0, length // 3, length // 2])
    starts = cuts[torch.bucketize(at, cuts, right=True) - 1]
    kwargs["position_ids"] = (at - starts).expand(batch, length).contiguous()
    return model, kwargs


def _padded(left: bool) -> Callable[[int, int], Made]:
    def build(length: int, batch: int) -> Made:
        model, kwargs = ZOO["qwen3"](length, batch)
        lengths = torch.arange(batch)[:, None] * 3 + max(2, length - 3 * batch)
        at = torch.arange(length)[None]
        keep = (at >= length - lengths) if left else (at < lengths)
        kwargs["attention_mask"] = keep.long()
        kwargs["input_ids"] = kwargs["input_ids"].masked_fill(~keep, 0)  # its table's padding row
        kwargs["labels"] = kwargs["labels"].masked_fill(~keep, -100)
        return model, kwargs

    return build


ZOO["packed"] = packed
ZOO["padded_left"], ZOO["padded_right"] = _padded(True), _padded(False)


def build(name: str, length: int, batch: int = 2, seed: int = 0) -> Made:
    """In training mode, float64; vectors (norms, biases) random, so that nothing hides."""
    torch.manual_seed(seed)
    model, kwargs = ZOO[name](length, batch)
    model = model.double().train()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
    double = {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for n, x in kwargs.items()
    }
    return model, double
