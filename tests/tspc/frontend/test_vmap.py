"""vmap inside a model: what it maps becomes plain ops, with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

import tspc
from tspc.backend.simulated import simulated_backend
from tspc.frontend import vmap

Tensor = torch.Tensor


class Mapping(nn.Module):
    """`end` of a region's result."""

    def __init__(self, end: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.end, self.up, self.down = end, nn.Linear(6, 12), nn.Linear(12, 6)
        self.table = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self, x + self.down(torch.tanh(self.up(x))))


def by_entry(m: Any, x: Tensor) -> Tensor:
    """A matrix for every batch entry, and a shift that is the same."""
    scale = x.mean(1)
    return torch.vmap(lambda a, s: torch.tanh(a @ m.table * s), in_dims=(0, 0))(x, scale)


def by_entry_and_token(m: Any, x: Tensor) -> Tensor:
    one = torch.vmap(lambda row, s: row * s.sum() + m.table[0], in_dims=(0, None))
    return torch.vmap(one, in_dims=(0, 0))(x, x[:, 0])


def written(m: Any, x: Tensor) -> Tensor:
    """In place, and what a loop makes is used after it and in the next."""

    def one(a: Tensor) -> Tensor:
        b = a.clone()
        b[:, 0] = b[:, 1] * 2
        return b

    first = torch.vmap(one)(x)
    return first + torch.vmap(torch.sin)(first)


@pytest.mark.parametrize("end", [by_entry, by_entry_and_token, written])
def test_equals_one_device(end: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    found = tspc.verify(Mapping(end).double(), (x,), {}, 3, {}, 1e-9)
    (graph,) = found.graphs
    assert [n for n, _, _ in graph.rewritten.choice.regions] and found.worst < 1e-12


def test_any_length_from_one_graph() -> None:
    torch.manual_seed(0)
    made: list[Any] = []
    m = Mapping(by_entry_and_token).double()
    torch._dynamo.reset()
    fn = torch.compile(m, backend=simulated_backend(2, graphs=made), dynamic=True)
    for length in (5, 8, 11):
        x = torch.randn(2, length, 6, dtype=torch.float64)
        torch.testing.assert_close(fn(x), m(x), rtol=1e-9, atol=1e-12)
    assert len(made) == 1


def test_a_part_without_gradient_is_refused() -> None:
    def one(a: Tensor) -> Tensor:
        with torch.no_grad():
            b = a.sum()
        return a * b

    model = Mapping(lambda m, x: torch.vmap(one)(x))
    with pytest.raises(Exception, match=r"test_vmap.py:\d+: no_grad inside a function that vmap"):
        tspc.plan(model, (torch.randn(2, 7, 6),), ranks=2)


def test_a_graph_without_a_loop_stays() -> None:
    g = torch.fx.Graph()
    g.output(g.call_function(torch.tanh, (g.placeholder("x"),)))
    gm = torch.fx.GraphModule({}, g)
    assert list(vmap._loops(gm.graph)) == []
    with pytest.raises(tspc.UnsupportedError, match="no part"):
        vmap._refuse([*gm.graph.nodes], "no part")
