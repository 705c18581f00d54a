"""What is compiled for a plan or a proof leaves other compiled models alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.variables.builder import VariableBuilder

import tspc
from tspc.seams import dynamo
from tspc.seams.dynamo import guard_instead, isolated


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))).square().mean()


class Other(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x).relu().sum()


class Counted:
    """A backend that runs a graph as it is."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return gm.forward


def entries(module: type[nn.Module]) -> int:
    return len(_debug_get_cache_entry_list(module.forward.__code__))


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("cls", [Mlp, Other], ids=["of the same class", "of another"])
def test_compiled_models_are_not_compiled_again(cls: type[nn.Module]) -> None:
    backend, x = Counted(), torch.randn(2, 6, 8)
    fn = torch.compile(cls(), backend=backend)
    fn(x)
    fn(torch.randn(2, 7, 8))  # from here on any length
    count = backend.graphs
    for _ in range(3):
        tspc.plan(Mlp(), (x,), ranks=2)
        tspc.verify(Mlp().double(), (x.double(),), ranks=2)
    for length in (6, 7, 9):
        fn(torch.randn(2, length, 8))
    assert backend.graphs == count == 2


def test_nothing_of_it_stays() -> None:
    for _ in range(12):  # more than the graphs that Dynamo makes of a function
        tspc.verify(Mlp().double(), (torch.randn(2, 6, 8).double(),), ranks=2)
    assert entries(Mlp) == 0


def test_what_was_compiled_before_stays() -> None:
    backend = Counted()
    fn = torch.compile(Mlp(), backend=backend)
    fn(torch.randn(2, 6, 8))
    with isolated():
        torch.compile(Mlp(), backend=Counted())(torch.randn(2, 6, 8))
        assert entries(Mlp) == 2
    fn(torch.randn(2, 6, 8))
    assert backend.graphs == 1
    with isolated():
        torch.compile(Other(), backend=Counted())(torch.randn(2, 6, 8))
        assert entries(Other) == 1
    assert entries(Other) == 0


def test_sizes_that_were_seen_are_forgotten() -> None:
    """Else a length of a plan would make the next one of a model symbolic, or the other way."""
    backend = Counted()
    fn = torch.compile(Mlp(), backend=backend)
    with isolated():
        torch.compile(Mlp(), backend=Counted())(torch.randn(2, 5, 8))
    fn(torch.randn(2, 6, 8))  # of this length alone
    with isolated():
        torch.compile(Mlp(), backend=Counted())(torch.randn(2, 5, 8))
    for length in (7, 8, 9):
        fn(torch.randn(2, length, 8))
    assert backend.graphs == 2


@pytest.mark.parametrize("told", [True, False])
def test_a_tensor_that_is_replaced_while_the_backend_works(told: bool) -> None:
    """Without `guard_instead` Dynamo's guards are of the tensor that it traced."""
    model, graphs, held = nn.Linear(3, 3), [0], list[object]()

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs[0] += 1
        if graphs[0] == 1:
            old = model.weight
            held.append(old)
            model.weight = nn.Parameter(old.detach().clone(), requires_grad=False)
            guard_instead({id(old)} if told else set())
        return gm.forward

    fn = torch.compile(model, backend=backend)
    if not told:
        with pytest.raises(AssertionError, match="Guard failed on the same frame"):
            fn(torch.ones(2, 3))
        return
    for _ in range(2):
        fn(torch.ones(2, 3))
    assert graphs == [1]
    model.weight.requires_grad_(True)
    fn(torch.ones(2, 3))
    assert graphs == [2]


class Marked(torch.Tensor):
    pass


def test_another_tensor_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VariableBuilder, "wrap_tensor", VariableBuilder.wrap_tensor)
    x, y = torch.ones(2).as_subclass(Marked), torch.zeros(2)
    inputs: list[Any] = []
    names: list[list[str]] = []

    @contextmanager
    def stand() -> Iterator[torch.Tensor]:
        yield y

    def stand_in(value: torch.Tensor, functions: Iterator[CodeType]) -> Any:
        names.append([code.co_name for code in functions])
        return stand() if value is x else None

    def backend(gm: torch.fx.GraphModule, given: Any) -> Any:
        inputs.append(given)
        return gm.forward

    def inner(z: torch.Tensor) -> torch.Tensor:
        return z + x

    dynamo.stand_ins(backend, stand_in)
    out = torch.compile(lambda z: inner(z), backend=backend)(torch.ones(2))
    assert torch.equal(out, torch.full((2,), 2.0))  # the values are of x
    assert any(v is y for v in inputs[0]) and not any(v is x for v in inputs[0])
    assert ["inner", "<lambda>"] in names or ["<lambda>"] in names
    count = len(names)
    torch.compile(lambda z: inner(z), backend="eager")(torch.ones(2))  # another backend
    assert len(names) == count
