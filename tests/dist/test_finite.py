"""`check_nan`: all ranks are told alike what is not finite; without it nothing is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import tspc
from tests.support.models import VOCABULARY, make, tokens_of
from tspc.runtime.comm.drivers import record

pytestmark = pytest.mark.dist
OPTIONS = {"compiler": "eager", "check_nan": True}


def _told(fn: Any, *args: Any) -> tuple[str, str]:
    """What a step raises: in the forward or the backward."""
    try:
        loss = fn(*args)
    except tspc.TspcError as e:
        return "forward", f"{type(e).__name__}: {e}"
    try:
        loss.backward()
    except tspc.TspcError as e:
        return "backward", f"{type(e).__name__}: {e}"
    return "", ""


def broken_parameter() -> list[tuple[str, str]]:
    """A step of finite values, then one with a NaN in what rank 1 holds."""
    m = make("llama_like", layers=1).float()
    fn = torch.compile(m, backend="tsp", options=OPTIONS)
    told = [_told(fn, tokens_of(8), tokens_of(8))]
    if dist.get_rank() == 1:
        m.blocks[0].mlp.up.weight._local_tensor.data[0, 0] = torch.nan
    return [*told, _told(fn, tokens_of(8), tokens_of(8))]


def test_a_parameter_that_is_not_finite(world: Any) -> None:
    for before, after in world(2).run(broken_parameter):
        assert before == ("", "")
        assert after == (
            "forward",
            "NonFiniteError: output 0 is not finite on ranks [0, 1] after the forward; already "
            "what the call was given is not finite: blocks.0.mlp.up.weight is not finite on "
            "ranks [1]",
        )


class Root(nn.Module):
    """The square root of zero: a finite loss without a finite gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.embedding(tokens))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return loss + (logits * 0.0).abs().sqrt().mean()


def broken_gradient() -> tuple[str, str]:
    torch.manual_seed(0)
    return _told(torch.compile(Root(), backend="tsp", options=OPTIONS), tokens_of(8))


def test_a_gradient_that_is_not_finite(world: Any) -> None:
    first, second = world(2).run(broken_gradient)
    assert first == second and first[0] == "backward"
    assert first[1].startswith("NonFiniteError: the gradient of embedding.weight is not finite on")
    assert "head.weight" in first[1] and first[1].endswith("finite, so it arises on the way")


def sent(check: bool) -> int:
    """Communications of the fourth step."""
    m = make("llama_like", layers=1).float()
    fn = torch.compile(m, backend="tsp", options={"compiler": "eager", "check_nan": check})
    for _ in range(3):
        fn(tokens_of(8), tokens_of(8)).backward()
    with record() as found:
        fn(tokens_of(8), tokens_of(8)).backward()
    return len(found)


def test_nothing_is_sent_for_it_by_default(world: Any) -> None:
    plain, checked = (world(2).run(sent, check=c)[0] for c in (False, True))
    assert checked == plain + 2
