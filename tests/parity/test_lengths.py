"""Simulated ranks: one graph serves all lengths, also where Dynamo makes every size a symbol; a
float of the model is its value."""

from __future__ import annotations

import pytest
import torch

from examples.llama_like import LlamaLike
from tests.support.models import make, tokens_of
from tspc.backend.simulated import Simulated, simulated_backend

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dynamic,graphs", [(None, 2), (True, 1)])
def test_lengths_compile_once(dynamic: bool | None, graphs: int) -> None:
    torch._dynamo.reset()
    model, made = make("llama_like", layers=1), list[Simulated]()
    fn = torch.compile(model, backend=simulated_backend(2, None, made), dynamic=dynamic)
    for length in (11, 12, 13, 3):
        given = (tokens_of(length), tokens_of(length))
        torch.testing.assert_close(fn(*given), model(*given), rtol=1e-9, atol=0)
    assert len(made) == graphs


class Scaled(LlamaLike):
    def forward(self, tokens: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[override]
        return super().forward(tokens, tokens) * scale


def test_a_float_that_changes() -> None:
    torch._dynamo.reset()
    model = Scaled(layers=1).double()
    fn, tokens = torch.compile(model, backend=simulated_backend(2)), tokens_of(9)
    for scale in (0.5, 0.25, 0.125):
        torch.testing.assert_close(fn(tokens, scale), model(tokens, scale), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [pytest.param("llama_like", marks=pytest.mark.wide), "gpt2_like"])
def test_a_batch_as_long_as_the_sequence(name: str) -> None:
    """Dynamo makes the two one symbol; the regions are the same nevertheless."""
    torch._dynamo.reset()
    model, made = make(name, layers=1), list[Simulated]()
    fn = torch.compile(model, backend=simulated_backend(2, None, made), dynamic=True)
    for length in (3, 7):
        given = (tokens_of(length, 3), tokens_of(length, 3))
        torch.testing.assert_close(fn(*given), model(*given), rtol=1e-9, atol=0)
    assert [len(g.rewritten.folds) for g in made] == [3, 3]
