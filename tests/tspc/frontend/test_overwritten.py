"""Parameters that a model writes into in its forward: what reads them after gets the new value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tspc
from tspc.base.errors import UnsupportedError
from tspc.frontend import overwritten
from tspc.frontend.overwritten import Overwriting

Tensor = torch.Tensor


class Model(torch.nn.Module):
    def __init__(self, write: Callable[[torch.nn.Parameter], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(6, 5, False), torch.nn.Linear(5, 6, False)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        before = self.up(x)
        self.write(self.up.weight)
        return self.down((self.up(x) + before).tanh()).square().mean()


def by_data(w: torch.nn.Parameter) -> None:
    w.data.mul_(0.5)


def by_no_grad(w: torch.nn.Parameter) -> None:
    with torch.no_grad():
        w.add_(1.0)


def by_a_view(w: torch.nn.Parameter) -> None:
    w.data.view(-1)[:3].fill_(2.0)


def by_copy(w: torch.nn.Parameter) -> None:
    with torch.no_grad():
        w.copy_(w * 2)


@pytest.mark.parametrize("write", [by_data, by_no_grad, by_a_view, by_copy])
def test_as_on_one_device(write: Callable[..., Any]) -> None:
    verified = tspc.verify(Model(write).double(), (torch.randn(2, 7, 6).double(),), {}, 2)
    assert verified.graphs[0].captured.writes


def read_after(gm: torch.fx.GraphModule) -> Overwriting:
    return Overwriting(gm, [("param", "up.weight"), ("input", "x")], [0])


def graph(build: Callable[[Any, Any], Any]) -> torch.fx.GraphModule:
    g = torch.fx.Graph()
    w, x = (torch.fx.Proxy(g.placeholder(n)) for n in ("w", "x"))
    g.output(build(w, x).node)
    return torch.fx.GraphModule({}, g)


def test_which_parameters_are_written() -> None:
    assert read_after(graph(lambda w, x: w + x)).places == set()
    assert read_after(graph(lambda w, x: w.detach().add_(x))).places == {0}
    assert read_after(graph(lambda w, x: x.add_(w))).places == set()


def test_a_view_that_is_written_and_read() -> None:
    def fn(w: Any, x: Any) -> Any:
        view = w.view(-1)
        return view.add_(x) + view * 2

    with pytest.raises(UnsupportedError, match="up.weight: a view of it is written and read"):
        read_after(graph(fn))


def test_a_write_with_gradient() -> None:
    run = read_after(graph(lambda w, x: (w.add_(x), x)[1]))
    with pytest.raises(UnsupportedError, match="up.weight: the model writes into it; write into"):
        run.run(torch.zeros(2, requires_grad=True), torch.ones(2))


def test_the_new_value_has_the_parameter_s_gradient() -> None:
    run = read_after(graph(lambda w, x: w.tanh()))
    (holder,) = (n for n in run.module.graph.nodes if n.name == "w")  # type: ignore[union-attr]
    w = torch.ones(2, requires_grad=True)
    run.now[holder], run.zero[holder] = torch.full((2,), 3.0), w - w.detach()
    got = run._read(holder)
    got.sum().backward()
    assert got.tolist() == [3, 3] and w.grad is not None and w.grad.tolist() == [1, 1]


def nodes(build: Callable[[Any], Any]) -> list[torch.fx.Node]:
    return [n for n in graph(lambda w, _: build(w)).graph.nodes if n.op != "output"][2:]


def test_what_is_a_view_and_what_a_write() -> None:
    (n,) = nodes(lambda w: w.view(-1))
    assert overwritten._is_alias(n) and not overwritten._may_write(n)
    assert not overwritten._detached(n)
    (n,) = nodes(lambda w: w.add_(1))
    assert overwritten._may_write(n) and overwritten._is_alias(n)
    (n,) = nodes(lambda w: w.data)
    assert overwritten._is_alias(n)
    (n,) = nodes(lambda w: w + 1)
    assert not overwritten._is_alias(n) and not overwritten._may_write(n)
    (n,) = nodes(lambda w: w.detach().view(-1))[1:]
    assert overwritten._detached(n) and overwritten._is_alias(n)
