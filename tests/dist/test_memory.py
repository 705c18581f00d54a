"""Each rank's share: parameters, gradients and Adam state, and what the forward leaves alive for
the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from examples.measure import peak_of, state_bytes
from tests.support.world import World

pytestmark = [pytest.mark.dist, pytest.mark.slow]
RANKS = 4


def make(name: str) -> torch.nn.Module:
    """Two layers, hidden 256, ffn 1024, heads 8/4, vocabulary 2048."""
    import transformers as t

    torch.manual_seed(0)
    if name == "gpt2":
        config = t.GPT2Config(
            vocab_size=2048,
            n_embd=256,
            n_layer=2,
            n_head=8,
            n_inner=1024,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
        model = t.GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"  # else a log call breaks the graph before the loss
        return model
    sizes = {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
    }
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**sizes))
    return t.Qwen3ForCausalLM(t.Qwen3Config(**sizes))


def held(name: str, tsp: bool) -> tuple[int, int, float]:
    """(bytes of parameters, gradients and Adam state; bytes alive after forward; loss)."""
    model = make(name)
    fn = torch.compile(model, backend="tsp") if tsp else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, 2048, (2, 512), generator=torch.Generator().manual_seed(0))
    fn(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    state = sum(state_bytes(model, optimizer).values())
    optimizer.zero_grad()
    _, alive, out = peak_of(lambda: fn(input_ids=tokens, labels=tokens))
    return state, alive, float(out.loss)


@pytest.fixture(scope="module")
def one() -> Any:
    world = World(1)
    yield world
    world.close()


WIDE = [pytest.param(name, marks=pytest.mark.wide) for name in ("llama", "gpt2")]


@pytest.mark.parametrize("name", ["qwen3", *WIDE])
def test_each_rank_holds_its_share(world: Any, one: World, name: str) -> None:
    ((state, alive, loss),) = one.run(held, name=name, tsp=False)
    for mine, left, same in world(RANKS).run(held, name=name, tsp=True):
        assert mine <= 0.30 * state
        assert abs(same - loss) <= 1e-4 * abs(loss)
        assert left <= 0.375 * alive
