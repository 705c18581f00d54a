"""Program edges on simulated ranks: outputs that are views, aliases, parameters or sizes, buffers
and inputs that forward writes to, graph breaks, several models, a whole train step compiled."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import tspc
from tests.support.models import loss_of, make, tokens_of
from tspc.backend.simulated import relative_errors, simulated_backend
from tspc.base.options import parse
from tspc.explain.report import reports

pytestmark = pytest.mark.sampled(3)

H = 16


class Edge(nn.Module):
    """An MLP over tokens, and an end that the test gives."""

    def __init__(self, end: Callable[..., Any]):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(H, 24), nn.Linear(24, H)
        self.end = end
        self.double()

    def forward(self, x: torch.Tensor) -> Any:
        return self.end(self, x, x + self.down(F.gelu(self.up(x))))


ENDS: dict[str, Callable[..., Any]] = {
    "flattened": lambda m, x, y: y.flatten(0, 1),
    "viewed": lambda m, x, y: y.view(y.shape[0], -1),
    "heads": lambda m, x, y: y.unflatten(-1, (4, -1)).transpose(1, 2),
    "transposed": lambda m, x, y: y.transpose(0, 1),
    "permuted": lambda m, x, y: y.permute(2, 1, 0),
    "twice": lambda m, x, y: (y, y),
    "view of another": lambda m, x, y: (y, y.flatten(0, 1)),
    "input": lambda m, x, y: (y, x),
    "view of an input": lambda m, x, y: (y, x.transpose(0, 1)),
    "parameter": lambda m, x, y: (y, m.up.weight),
    "view of a parameter": lambda m, x, y: (y, m.up.weight.t()),
    "used parameter": lambda m, x, y: (y, m.up.weight * 2),
    "length": lambda m, x, y: (y, x.shape[1]),
    "length as a factor": lambda m, x, y: y * x.shape[1] / (x.shape[0] + x.shape[1]),
    "length in a sum": lambda m, x, y: (y.sum() / x.shape[1], y.shape[0] * x.shape[1]),
    "sum over the sequence": lambda m, x, y: (y.sum(1), y.mean((0, 1))),
    "none": lambda m, x, y: (y, None, {"a": y * 2, "b": [x.shape[1]]}),
    "first row": lambda m, x, y: y[:, 0],
    "last row": lambda m, x, y: y[:, -1],
}


@pytest.mark.parametrize("end", ENDS)
def test_outputs(end: str) -> None:
    x = torch.randn(3, 13, H, dtype=torch.float64, requires_grad=True)
    found = tspc.verify(Edge(ENDS[end]), (x,), {}, 3, {}, 1e-9)
    assert len(found.graphs) == 1
    (fold,) = found.graphs[0].rewritten.folds
    shared = end in ("used parameter", "view of a parameter")  # others read it too: it is gathered
    weights = {"down.weight"} if shared else {"up.weight", "down.weight"}
    assert set(fold.kwargs["fold"].weights) == weights


@pytest.mark.parametrize("end", ["length", "length as a factor", "length in a sum", "viewed"])
def test_sizes_follow_the_call(end: str) -> None:
    """One graph for all lengths."""
    model, made = Edge(ENDS[end]), []
    torch._dynamo.reset()
    fn = torch.compile(model, backend=simulated_backend(2, None, made), dynamic=True)
    for length in (12, 13, 7):
        x = torch.randn(3, length, H, dtype=torch.float64)
        mine, one = fn(x), model(x)
        for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (mine, one))):
            if isinstance(b, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            else:
                assert a == b
    assert len(made) == 1


class Counting(nn.Module):
    """Forward writes to buffers: a reduction over the sequence, and a number of calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(H, 24), nn.Linear(24, H)
        self.register_buffer("mean", torch.zeros(H))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(F.gelu(self.up(x)))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * y.mean((0, 1)))
            self.calls += 1
        return y


def test_written_buffers() -> None:
    x = torch.randn(2, 13, H, dtype=torch.float64)
    assert "mean" in tspc.verify(Counting(), (x,), {}, 2, {}, 1e-9).errors["buffer"]


def test_a_written_input() -> None:
    def end(m: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return y + x

    x = torch.randn(2, 13, H, dtype=torch.float64)
    one, mine = x.clone(), x.clone()
    torch._dynamo.reset()
    expected = Edge(end)(one)
    got = torch.compile(Edge(end), backend=simulated_backend(2))(mine)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(mine, one)


def test_a_copy_may_be_written() -> None:
    def end(m: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = x.clone()
        z.add_(y).mul_(2)
        z[:, :, 0] = 0
        return z

    x = torch.randn(2, 13, H, dtype=torch.float64, requires_grad=True)
    tspc.verify(Edge(end), (x,), {}, 2, {}, 1e-9)


def test_graph_breaks() -> None:
    """What one graph gives the next is whole, and gradients flow through."""

    def end(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return m.down(torch.tanh(m.up(y))).square().mean()

    x = torch.randn(2, 13, H, dtype=torch.float64, requires_grad=True)
    found = tspc.verify(Edge(end), (x,), {}, 3, {}, 1e-9)
    assert len(found.graphs) == 2
    (line,) = reports(found.graphs[0].rewritten)
    assert re.match(r"test_edges.py:\d+: a graph break, at which 1 activation cut", str(line))
    assert line.bytes == 2 * 13 * H * 8 and not line.replicated
    assert not reports(found.graphs[1].rewritten)


def test_an_input_is_given_on() -> None:
    """What a graph returns may be what it was given, or a view of it."""

    def end(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        turned, same, weight = y.transpose(1, 2), x.to(x.dtype), m.up.weight.t()
        torch._dynamo.graph_break()
        return (turned @ same).square().mean() + weight.square().mean()

    x = torch.randn(2, 13, H, dtype=torch.float64)
    assert len(tspc.verify(Edge(end), (x,), {}, 3, {}, 1e-9).graphs) == 3


@pytest.mark.parametrize("row", [False, True])
def test_what_a_mask_chooses_is_set(row: bool) -> None:
    def end(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = m.up(y)
        z[z.sum(-1) > 0 if row else z > 0.5] = 0.25
        return m.down(torch.tanh(z)).square().mean()

    x = torch.randn(2, 13, H, dtype=torch.float64)
    (graph,) = tspc.verify(Edge(end), (x,), {}, 3, {}, 1e-9).graphs
    assert not graph.rewritten.typed.fallbacks


def test_a_graph_without_inputs() -> None:
    def end(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        scale = torch.arange(H, dtype=x.dtype).new_ones(()) + torch.arange(H)
        scale = scale + torch.tensor([1.0, 2.0]).sum()
        torch._dynamo.graph_break()
        return (y * scale).square().mean()

    x = torch.randn(2, 13, H, dtype=torch.float64)
    assert len(tspc.verify(Edge(end), (x,), {}, 3, {}, 1e-9).graphs) == 3


def test_a_large_output_that_is_gathered_is_reported() -> None:
    def end(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(m.up(y))

    plan = tspc.plan(Edge(end), (torch.randn(2, 13, H, dtype=torch.float64),), ranks=2)
    assert not reports(plan.rewritten)
    (s,) = (x for x in plan.rewritten.symbols if plan.sizes[x] == 13)
    (line,) = reports(plan.rewritten, {**plan.sizes, s: 2**20})
    assert re.match(r'test_edges.py:\d+: an output .* gathered .*"outputs": "sharded"', str(line))
    kept = tspc.plan(Edge(end), (torch.randn(2, 13, H),), ranks=2, options={"outputs": "sharded"})
    assert not reports(kept.rewritten, {**kept.sizes, s: 2**20})


def test_several_models_in_one_process() -> None:
    tokens, made = tokens_of(13), []
    torch._dynamo.reset()
    models = [make("llama_like", layers=1), make("gpt2_like", layers=1), make("llama_like", seed=1)]
    backend = simulated_backend(2, None, made)
    compiled = [torch.compile(m, backend=backend) for m in models]
    for _ in range(2):
        for fn, m in zip(compiled, models):
            torch.testing.assert_close(fn(tokens, tokens), m(tokens, tokens), rtol=1e-9, atol=0)
    assert len(made) == 3


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backward", [False, True])
def test_a_train_step_is_compiled(backward: bool) -> None:
    """A function is the compiled root, with the model and its loss inside."""
    model, tokens = make("llama_like", layers=1), tokens_of(13)
    targets = tokens.roll(-1, 1)

    def train_step(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        if backward:
            loss.backward()
        return loss

    ends = []
    torch._dynamo.reset()
    compiled = torch.compile(train_step, backend=simulated_backend(2, parse({})))
    for step in (train_step, compiled):
        model.zero_grad()
        loss = step(tokens, targets)
        if not backward:
            loss.backward()
        ends.append({"loss": loss.detach(), **gradients(model)})
    errors = relative_errors(ends[1], ends[0])
    assert max(errors.values()) <= 1e-9, errors


def test_nested_fullgraph() -> None:
    model, tokens = make("llama_like", layers=1), tokens_of(13)
    backend, made = None, []
    torch._dynamo.reset()
    backend = simulated_backend(2, None, made)
    inner = torch.compile(model, backend=backend, fullgraph=True)

    def outer(tokens: torch.Tensor) -> torch.Tensor:
        return loss_of(inner(tokens, tokens)) * 2

    got = torch.compile(outer, backend=backend, fullgraph=True)(tokens)
    torch.testing.assert_close(got, 2 * model(tokens, tokens), rtol=1e-9, atol=0)
    assert len(made) == 1
