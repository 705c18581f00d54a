"""All ranks of one graph in this process: shards in, whole outputs and gradients out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.tiny import Cached, Mlp, proved, tokens
from tspc.backend.simulated import Simulated, relative_errors, simulated_backend
from tspc.base.errors import UnsupportedError
from tspc.base.options import parse

Tensor = torch.Tensor


def test_the_backend_collects_its_graphs() -> None:
    torch._dynamo.reset()
    graphs: list[Simulated] = []
    model = Mlp().double()
    run = torch.compile(model, backend=simulated_backend(2, graphs=graphs))
    x = tokens().requires_grad_()
    run(x).backward()
    assert len(graphs) == 1 and graphs[0].ranks == 2 and graphs[0].saved_elements > 0
    got = {"x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
    x.grad = None
    model.zero_grad()
    model(x).backward()
    wanted = {"x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
    for n, g in wanted.items():
        torch.testing.assert_close(got[n], g)
    assert graphs[0].rows() == [4]


@pytest.mark.parametrize("outputs", ["full", "sharded"])
def test_outputs_that_are_cut(outputs: str) -> None:
    (graph,) = proved(Cached(), 3, outputs=outputs)
    cut = [r for r in graph.rewritten.results if r is not None and r.kind != "whole"]
    assert bool(cut) == (outputs == "sharded")
    for r in cut:
        span, at = graph.where(r)
        assert span.length == 7 and at == (r.dim, 1)


def test_what_a_model_writes() -> None:
    class Counting(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(6, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += x.sum((0, 1))
            return super().forward(x)

    torch._dynamo.reset()
    model, x = Counting().double(), tokens()
    torch.compile(model, backend=simulated_backend(2))(x)
    torch.testing.assert_close(model.seen, x.sum((0, 1)))


def test_memory_that_is_shared_with_what_is_written() -> None:
    def fn(cache: Tensor, x: Tensor) -> Tensor:
        cache.add_(1)
        return x.tanh() * 2

    torch._dynamo.reset()
    run: Any = torch.compile(fn, backend=simulated_backend(2))
    memory = torch.zeros(9, 6)
    run(torch.zeros(7, 6), torch.zeros(7, 6))
    with pytest.raises(UnsupportedError, match="shares memory with"):
        run(memory[:7], memory[2:])


def test_replicated_results_are_equal_on_ranks() -> None:
    (graph,) = proved(Mlp(), 2)
    assert all(r is None or r.kind == "whole" for r in graph.rewritten.results)
    assert parse({}).strict is False


def test_relative_errors() -> None:
    wanted = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    got = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.005, 0.0])}
    errors = relative_errors(got, wanted)
    assert errors["a"] == pytest.approx(0.1) and errors["b"] == pytest.approx(1.0)
    assert relative_errors({"a": torch.zeros(1)}, {"a": torch.zeros(1)}) == {"a": 0}
