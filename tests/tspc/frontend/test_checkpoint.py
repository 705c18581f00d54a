"""Activation checkpointing in the model: parts are made again in the backward, folds included, and
all else is as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import tspc
from examples.llama_like import LlamaLike
from tests.support.models import VOCABULARY, call, make, tokens_of
from tspc.backend.simulated import Simulated
from tspc.frontend import checkpoint as module

pytestmark = [pytest.mark.slow, pytest.mark.sampled(2)]


class Checkpointed(nn.Module):
    """A block of which the whole or a part is checkpointed."""

    def __init__(self, block: nn.Module, reentrant: bool):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, *args: torch.Tensor) -> Any:
        return checkpoint(self.block, *args, use_reentrant=self.reentrant)


class Twice(nn.Module):
    """A checkpoint inside of another."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        block.mlp = Checkpointed(block.mlp, False)  # type: ignore[assignment]

    def forward(self, *args: torch.Tensor) -> Any:
        return checkpoint(self.block, *args, use_reentrant=False)


def model(part: str | None, layers: int = 3) -> LlamaLike:
    torch.manual_seed(0)
    made = LlamaLike(VOCABULARY, 32, layers, 4, 2, 50).double()
    blocks: Any = made.blocks
    for i, block in enumerate(blocks):
        if part in ("attention", "mlp"):
            setattr(block, part, Checkpointed(getattr(block, part), False))
        elif part == "twice":
            blocks[i] = Twice(block)
        elif part is not None:
            blocks[i] = Checkpointed(block, part == "reentrant")
    return made


def run(part: str | None, ranks: int = 2, layers: int = 3, **options: Any) -> Simulated:
    tokens = tokens_of(13)
    found = tspc.verify(model(part, layers), (tokens, tokens), {}, ranks, options, 1e-9)
    (graph,) = found.graphs
    assert len(graph.rewritten.choice.regions) == 2 * layers + 1
    return graph


def activations(graph: Simulated) -> int:
    """Elements that the last forward left alive beside parameters and inputs."""
    given = {n.name for n in graph.parts.forward.graph.nodes if n.op == "placeholder"}
    (out,) = (n for n in graph.parts.forward.graph.nodes if n.op == "output")
    saved = [n for n in out.args[0][graph.parts.outputs :] if n.name not in given]
    return sum(n.meta["val"].numel() for n in saved if isinstance(n.meta["val"], torch.Tensor))


def folds(graph: Simulated) -> list[str]:
    """The folds and their backwards, in the order of the backward graph."""
    assert graph.parts.backward is not None
    names = [str(n.target) for n in graph.parts.backward.graph.nodes]
    return [n.split(".")[1] for n in names if n.startswith("tspc.fold")]


@pytest.mark.parametrize(
    ("part", "schedule"),
    [
        ("block", "ring"),
        ("block", "stationary"),
        ("reentrant", "auto"),
        ("attention", "gather"),
        ("mlp", "auto"),
        ("twice", "ring"),
    ],
)
def test_equals_one_device(part: str, schedule: str) -> None:
    run(part, 3, 2, schedule=schedule)


def test_blocks_are_made_again() -> None:
    """Of each block its input is alive; of the rest what was before."""
    plain, again = run(None), run("block")
    assert folds(plain) == ["fold_backward"] * 7
    # a block's attention runs again for the MLP behind it, the MLP for nothing
    block = ["fold", "fold_backward", "fold_backward"]
    assert folds(again) == ["fold_backward", *block * 3]
    rest = activations(plain) - activations(run(None, layers=2))  # of one block
    kept = activations(again) - activations(run("block", layers=2))
    rows, hidden = 2 * -(-13 // 2), 32  # zigzag pads to whole chunks
    assert kept <= 2 * (rows + 2) * hidden < rest / 4


def test_a_checkpointed_mlp_saves_no_products() -> None:
    graph = run("mlp")
    bodies = graph.rewritten.bodies
    assert not bodies["blocks.0.mlp.block"].saves
    assert bodies["blocks.0.attention"].saves
    assert "fold" not in folds(graph)
    assert activations(graph) < activations(run(None))


@pytest.mark.parametrize("name", ["hf_llama", "hf_qwen3"])
def test_gradient_checkpointing_enable(name: str) -> None:
    kwargs = call(name, tokens_of(13), True)
    found = []
    for enable in (False, True):
        made: Any = make(name).float()  # one device runs again without the mode that widens
        made.config.use_cache = False
        if enable:
            made.gradient_checkpointing_enable()
        made.train()
        (graph,) = tspc.verify(made, (), kwargs, 2, {}, 1e-5).graphs
        assert len(graph.rewritten.choice.regions) == 5
        found.append(graph)
    assert activations(found[1]) < activations(found[0])
    assert folds(found[1]).count("fold") == 2


def test_a_graph_without_a_part_is_itself() -> None:
    g = torch.fx.Graph()
    g.output(g.call_function(torch.tanh, (g.placeholder("x"),)))
    gm = torch.fx.GraphModule({}, g)
    same = module.inlined(gm)
    assert [n.name for n in same.graph.nodes] == ["x", "tanh", "output"]
    assert not any(module._is_body(gm, n) for n in gm.graph.nodes)
