"""What a Dynamo graph holds that capture would read wrongly is an error with its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from tspc.base.errors import UnsupportedError
from tspc.frontend.reject import WHY, check


def graph(name: str, inner: bool = False) -> torch.fx.GraphModule:
    def call(*args: Any) -> Any:
        return args

    call.__name__ = name
    g = torch.fx.Graph()
    x = g.placeholder("x")
    y = g.call_function(call, (x,))
    g.output(y)
    gm = torch.fx.GraphModule({}, g)
    if not inner:
        return gm
    outer = torch.fx.Graph()
    outer.output(outer.call_module("inner", (outer.placeholder("x"),)))
    return torch.fx.GraphModule({"inner": gm}, outer)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", WHY)
def test_what_is_refused(name: str, inner: bool) -> None:
    with pytest.raises(UnsupportedError) as e:
        check(graph(name, inner))
    assert str(e.value).endswith(WHY[name]) and str(e.value) != WHY[name]


def test_all_else_is_not() -> None:
    check(graph("tanh"))
    check(graph("tanh", inner=True))


def test_the_line_is_told() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.register_hook(lambda g: g * 2)
        return y.sin()

    with pytest.raises(BackendCompilerFailed, match=r"test_reject.py:\d+: a hook on a gradient"):
        torch.compile(fn, backend=lambda gm, _: check(gm) or gm.forward)(
            torch.ones(2, requires_grad=True)
        )
