"""The bodies of folds: shared by layers, told apart by program; what a backward is compiled for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from examples.llama_like import LlamaLike
from tests.support.zoo import build
from tspc.backend.simulated import Simulated, simulated_backend
from tspc.runtime.fold.pieces import cotangent_names


class Renamed(torch.nn.Module):
    """The same model, its sizes the sizes of other arguments."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, words: torch.Tensor, wanted: torch.Tensor) -> Any:
        return self.inner(words, wanted)


def test_programs_with_other_symbols_share_no_body() -> None:
    torch.manual_seed(0)
    model, tokens = LlamaLike(layers=2).double(), torch.randint(0, 23, (2, 9))
    made: list[Simulated] = []
    for m in (model, Renamed(model)):
        torch._dynamo.reset()
        fn = torch.compile(m, backend=simulated_backend(2, None, made), dynamic=True)
        torch.testing.assert_close(fn(tokens, tokens), model(tokens, tokens), rtol=1e-9, atol=0)
    keys = [[b.key for b in g.rewritten.bodies.values()] for g in made]
    assert made[0].rewritten.symbols != made[1].rewritten.symbols
    assert not set(keys[0]) & set(keys[1])
    assert [len(set(k)) for k in keys] == [3, 3]  # attention, MLP and head; layers share theirs


@pytest.mark.parametrize("name", ["titan", "llama"])
def test_queries_and_keys_have_a_gradient(name: str) -> None:
    """Also when they were turned as complex numbers: compiled pieces trust what is declared."""
    torch._dynamo.reset()
    (model, kwargs), made = build(name, 9), list[Simulated]()
    torch.compile(model, backend=simulated_backend(2, None, made))(**kwargs)
    bodies = [b for b in made[0].rewritten.bodies.values() if b.attentions]
    assert bodies
    for body in bodies:
        wanted = {n for a in body.attentions for n in a.operands.all[:3]}
        assert wanted <= set(cotangent_names(body, 0))
