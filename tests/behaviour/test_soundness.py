"""Rules by brute force on captured models, and factor classes that do not depend on sizes.

The same programs captured with all sizes equal must have the same factor classes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from examples.gpt2_like import GPT2Like
from examples.llama_like import LlamaLike
from tspc.backend.brute import check, values
from tspc.factors.factor import Factor
from tspc.frontend.capture import Captured, capture
from tspc.ops.attention import ATTENTION
from tspc.passes.analyse.factorize import Analysis, factorize
from tspc.passes.analyse.regions import find_regions
from tspc.passes.analyse.sequence import sequences
from tspc.passes.rewrite.normalize import normalize

aten = torch.ops.aten


def analysed(model: torch.nn.Module, kwargs: dict[str, Any]) -> tuple[Analysis, dict[str, Any]]:
    """The analysis of a static capture and the value of every placeholder."""
    found: list[tuple[Captured, list[Any]]] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append((capture(gm, inputs), list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(**kwargs)
    captured, inputs = found[0]
    program = normalize(captured.program)
    given = {n: inputs[i].detach() for n, i in captured.positions.items()}
    return factorize(program), given


def library(name: str, h: int, ffn: int, heads: int, kv: int, d: int, v: int) -> torch.nn.Module:
    import transformers as t

    config = {"llama": t.LlamaConfig, "qwen3": t.Qwen3Config}[name](
        vocab_size=v,
        hidden_size=h,
        intermediate_size=ffn,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=d,
    )
    return {"llama": t.LlamaForCausalLM, "qwen3": t.Qwen3ForCausalLM}[name](config)


@pytest.mark.parametrize("name", ["llama_like", "gpt2_like", "llama", "qwen3"])
def test_pieces_rejoin(name: str) -> None:
    torch.manual_seed(0)
    if name == "llama_like":
        model: torch.nn.Module = LlamaLike(23, 24, 1, 4, 2, 10)
    elif name == "gpt2_like":
        model = GPT2Like(23, 24, 1, 4, 16)
    else:
        model = library(name, 24, 10, 4, 2, 6, 23)
    model = model.double()
    tokens = torch.randint(0, 23, (3, 7))
    ids = "tokens" if name.endswith("like") else "input_ids"
    a, given = analysed(model, {ids: tokens, "labels": tokens})
    assert not a.fallbacks
    assert sum(check(a, values(a.program, given)).values()) > 60


def signature(a: Analysis) -> list[tuple]:
    """Per value, which dims share a factor with which: the partition, sizes apart."""
    seen: dict[Factor, int] = {}
    out = []
    for r in a.records:
        for side in (*r.ins, *r.outs):
            dims = []
            for d in side or ():
                dims.append(tuple(seen.setdefault(f, len(seen)) for f in a.F.leaves(tuple(d))))
            out.append((r.node.name, tuple(dims)))
    return out


def test_equal_sizes_merge_nothing() -> None:
    tokens = torch.randint(0, 23, (3, 7))
    apart, _ = analysed(library("qwen3", 24, 10, 4, 2, 6, 23), {"input_ids": tokens})
    equal = torch.randint(0, 16, (16, 16))
    same, _ = analysed(library("qwen3", 16, 16, 4, 4, 4, 16), {"input_ids": equal})
    one, two = (find_regions(a, sequences(a)) for a in (apart, same))
    assert len(one.chosen) == len(two.chosen) == 3
    assert [sorted(g.weights) for g in one.chosen] == [sorted(g.weights) for g in two.chosen]
    for a in (apart, same):
        (leaf,) = sequences(a)
        exchanged = {
            r.node.op for r in a.records if any(x[0] == "exchange" for x in r.roles.get(leaf, ()))
        }
        assert exchanged == {ATTENTION}
    cases = [(a, b) for a, b in zip(signature(apart), signature(same)) if a[0] != b[0]]
    assert not cases
