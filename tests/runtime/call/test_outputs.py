"""Outputs as DTensors: the exchange to torch's chunks and its transpose, parity with one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, Shard

import tspc
from tests.support.models import call, make, tokens_of, whole
from tspc.backend.simulated import relative_errors
from tspc.ir.layout import Layout, Span
from tspc.runtime.call.outputs import from_chunks, to_chunks
from tspc.runtime.comm.drivers import lockstep
from tspc.runtime.comm.exchange import clear, take
from tspc.runtime.comm.exchange import whole as gathered
from tspc.runtime.comm.requests import Axis


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks,length,trail", [(2, 8, 1), (3, 11, 1), (4, 3, 2), (4, 13, 3)])
def test_rows_become_chunks_and_back(order: str, ranks: int, length: int, trail: int) -> None:
    layout = Layout(ranks, order)
    rows = int(layout.chunk_rows(length))
    x = torch.randn(2, length * trail, 3)
    axes = [Axis("", ranks, r) for r in range(ranks)]
    span = Span(layout, rows, length)
    local = [take(span, r, x, 1, 1) for r in range(ranks)]
    chunks = lockstep([to_chunks(a, span, l, 1) for a, l in zip(axes, local)])
    wanted = list(x.chunk(ranks, 1))
    for mine, one in zip(chunks, wanted + [x[:, :0]] * (ranks - len(wanted))):
        assert torch.equal(mine, one)
    back = lockstep([from_chunks(a, span, c, 1, trail) for a, c in zip(axes, chunks)])
    for r, mine in enumerate(back):
        assert torch.equal(mine, clear(span, r, local[r], 1, 1))


@pytest.mark.parametrize("model,length", [("llama_like", 11), ("hf_qwen3", 3)])
@pytest.mark.sampled(2)
def test_equals_one_device(model: str, length: int) -> None:
    kwargs = call(model, tokens_of(length), model == "hf_qwen3")
    found = tspc.verify(make(model, layers=1), (), kwargs, 3, {"outputs": "sharded"}, 1e-6)
    (graph,) = found.graphs
    assert "sharded" in {r.kind for r in graph.rewritten.results if r is not None}


def logits(length: int, layout: str) -> tuple[float, float, tuple[int, ...]]:
    """Errors of sharded logits and of the gradients through them; the local shape."""
    ends, errors, shape = [], [], ()
    for options in (None, {"outputs": "sharded", "layout": layout, "compiler": "eager"}):
        m = make("llama_like", layers=1)
        fn = m if options is None else torch.compile(m, backend="tsp", options=options)
        out = fn(tokens_of(length))
        if options is not None:
            assert isinstance(out, DTensor) and out.placements == (Shard(1),)
            shape = tuple(out.to_local().shape)
        weight = torch.linspace(-1, 1, length, dtype=out.dtype)[None, :, None]
        if options is not None:
            weight = DTensor.from_local(weight, out.device_mesh)
        loss = (out.square() * weight).sum()
        whole(loss).backward()
        ends.append({n: whole(p.grad) for n, p in m.named_parameters()})
        errors.append(whole(out.detach()))
    error = float((errors[1] - errors[0]).norm() / errors[0].norm())
    return error, max(relative_errors(ends[1], ends[0]).values()), shape


@pytest.mark.dist
@pytest.mark.parametrize("length,layout", [(11, "zigzag"), (3, "contiguous")])
@pytest.mark.sampled(2)
def test_sharded_logits(world: Any, length: int, layout: str) -> None:
    shapes = []
    for error, gradient, shape in world(4).run(logits, length=length, layout=layout):
        assert error < 1e-9 and gradient < 1e-9
        shapes.append(shape[1])
    assert shapes == [len(c) for c in torch.arange(length).chunk(4)] + [0] * (length == 3)


class Ranged(nn.Module):
    """An MLP with a loss, returning the last three rows of its hidden values and every row but the
    first of what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.up(x)
        y = self.down(h.relu())
        return y.pow(2).mean(), h[:, -3:], (2 * x)[:, 1:][:, ::2]


@pytest.mark.parametrize("outputs", ["auto", "full"])
@pytest.mark.parametrize("length", [2, 11])
def test_a_range_is_cut_from_the_whole(outputs: str, length: int) -> None:
    torch.manual_seed(0)
    model, x = Ranged().double(), torch.randn(2, length, 16, dtype=torch.double)
    found = tspc.verify(model, (x.requires_grad_(),), {}, 3, {"outputs": outputs}, 1e-12)
    (graph,) = found.graphs
    assert len(found.errors["output"]) == 3
    assert len(graph.rewritten.choice.regions) == 1 and not graph.rewritten.typed.fallbacks


@pytest.mark.parametrize("ranks,length", [(2, 8), (3, 7)])
def test_a_whole_value_is_laid_out_as_on_one_device(ranks: int, length: int) -> None:
    """Without room between its rows where pads were: what comes next may view it flat."""
    layout = Layout(ranks)
    rows = int(layout.chunk_rows(length))
    x = torch.randn(2, length, 3)
    span = Span(layout, rows, length)
    local = [take(span, r, x, 1, 1) for r in range(ranks)]
    for mine in lockstep([gathered(span, l, 1, 1) for l in local]):
        assert torch.equal(mine.view(-1), x.view(-1))
