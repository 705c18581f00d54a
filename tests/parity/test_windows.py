"""Ranges of the sequence stay cut, one row of it is not gathered whole; all equal one device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tspc
from examples.llama_like import LlamaLike
from tests.support.wide import each_once
from tspc.ir.kinds import WHOLE
from tspc.passes.lower.unit import Unit

pytestmark = [pytest.mark.slow, pytest.mark.sampled(3)]

VOCABULARY = 29
Loss = Callable[[Tensor, Tensor], Tensor]


class Model(LlamaLike):
    def __init__(self, loss: Loss) -> None:
        super().__init__(VOCABULARY, 16, 1, 2, 1, 20)
        self.loss = loss

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.loss(super().forward(tokens), tokens)


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    logits = logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


def third_token(logits: Tensor, tokens: Tensor) -> Tensor:
    """Two ends left out, no reduction, classes in the middle."""
    losses = F.cross_entropy(
        logits[:, 1:-2].transpose(1, 2), tokens[:, 3:], reduction="none", label_smoothing=0.1
    )
    return (losses * torch.arange(losses.shape[1], device=tokens.device)).sum()


def previous_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, 1:].flatten(0, 1), tokens[:, :-1].flatten(), reduction="sum")


def mean_of_a_range(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits[:, 1:].logsumexp(-1).mean() + logits[:, :-1].sigmoid().mean(1).pow(2).sum()


def contracted(logits: Tensor, tokens: Tensor) -> Tensor:
    x = logits[:, 1:-1]
    return torch.einsum("bsv,bsw->bvw", x, x.tanh()).pow(2).mean()


def unlike_ranges(logits: Tensor, tokens: Tensor) -> Tensor:
    x = logits.sigmoid()
    return (x[:, 1:] - x[:, :-1] * x[:, 1:].roll(1, -1)).pow(2).mean()


def differences(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.diff(dim=1).tanh().sum(1).pow(2).mean() + logits.diff(dim=-1).pow(2).mean()


def three_ranges(logits: Tensor, tokens: Tensor) -> Tensor:
    """A weighted mean of a token and its neighbours."""
    x = logits.tanh()
    return (x[:, :-2] + 2 * x[:, 1:-1] - x[:, 2:]).exp().mean()


def whole_along_a_range(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits[:, 1:].sigmoid().cumsum(1).pow(2).mean()


def last(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, -1], tokens[:, 0])


def last_kept(logits: Tensor, tokens: Tensor) -> Tensor:
    return (logits[:, -1:] * logits).mean() + logits[:, 1].pow(2).sum()


def returned(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits[:, :-1].tanh()


# loss -> what runs replicated, whether anything of the sequence is gathered
CASES: dict[Loss, tuple[set[str], bool]] = {
    next_token: (set(), False),
    third_token: (set(), False),
    previous_token: (set(), False),
    mean_of_a_range: (set(), False),
    contracted: (set(), False),
    last: (set(), False),
    last_kept: (set(), False),
    unlike_ranges: (set(), False),
    differences: (set(), False),
    three_ranges: (set(), False),
    whole_along_a_range: ({"slice"}, True),
    returned: ({"slice"}, True),
}
SIZES = [(2, 9, "zigzag"), (3, 7, "contiguous"), (4, 5, "zigzag"), (4, 3, "contiguous")]


def run(loss: Loss, ranks: int, length: int, layout: str) -> Unit:
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (2, length))
    model = Model(loss).double()
    options = {"layout": layout, "outputs": "full"}
    found = tspc.verify(model, (tokens,), {}, ranks, options, 1e-9)
    assert found.errors["gradient of"]
    (graph,) = found.graphs
    return graph.rewritten


@pytest.mark.parametrize("loss,ranks,length,layout", each_once(list(CASES), SIZES[:2]))
def test_a_range_stays_cut(loss: Loss, ranks: int, length: int, layout: str) -> None:
    replicated, gathered = CASES[loss]
    rewritten = run(loss, ranks, length, layout)
    assert {f.op.split(".")[1] for f in rewritten.typed.fallbacks} == replicated
    assert any(n.op == WHOLE for n in rewritten.typed.program.nodes) == gathered


@pytest.mark.parametrize("loss", [next_token, last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("ranks,length,layout", SIZES[2:])
def test_short_sequences(loss: Loss, ranks: int, length: int, layout: str) -> None:
    assert not run(loss, ranks, length, layout).typed.fallbacks


def test_the_head_and_its_loss_are_one_region() -> None:
    """No rank holds all logits of its rows: the head is cut along the vocabulary."""
    rewritten = run(next_token, 2, 9, "zigzag")
    fold = rewritten.folds[-1].kwargs["fold"]
    assert fold.name == "head" and fold.size == VOCABULARY
    assert {e.kind for e in fold.exits} == {"lse", "sum"}


def test_every_length_from_one_plan() -> None:
    tokens = torch.zeros(2, 9, dtype=torch.long)
    rewritten = tspc.plan(Model(next_token), (tokens,), ranks=2).rewritten
    assert not rewritten.typed.fallbacks and rewritten.choice.leaf is not None
    assert not isinstance(rewritten.choice.leaf.size, int)
