"""A Dynamo graph as a program: names, kinds, sizes, gradients, writes, constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn as nn

from tests.support.tiny import Mlp, tokens
from tspc.base.errors import CaptureError, UnsupportedError
from tspc.base.options import Options
from tspc.frontend import capture as module
from tspc.frontend.capture import Captured, capture
from tspc.ir.program import BUFFER, CONSTANT, INPUT, PARAM, Program
from tspc.seams.tensors import FakeTensorMode

Tensor = torch.Tensor
S = sympy.Symbol("s", positive=True, integer=True)


def captured(fn: Callable[..., Any], *args: Any, dynamic: bool = False, **options: Any) -> Captured:
    got: list[Captured] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        got.append(capture(gm, inputs, **options))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=dynamic)(*args)
    return got[0]


def ops(p: Program) -> list[str]:
    return [str(n.op) for n in p.nodes if n.is_call]


def test_names_and_kinds() -> None:
    model = nn.BatchNorm1d(4)
    c = captured(model, torch.randn(2, 4))
    kinds = {n.name: n.op for n in c.program.nodes if n.name in c.positions}
    assert kinds["weight"] == PARAM and kinds["running_mean"] == BUFFER
    assert [n for n, k in kinds.items() if k == INPUT] == ["args_0"]
    assert {c.names[i]: i for i in c.names} == c.positions
    written = {c.names[i] for i in c.writes}
    assert written == {"running_mean", "running_var", "num_batches_tracked"}
    assert not c.graph_break


def test_sizes_at_a_call() -> None:
    c = captured(Mlp().double(), tokens(7), dynamic=True)
    args: list[Any] = [torch.empty(0)] * (max(c.positions.values()) + 1)
    args[c.positions["x"]] = torch.empty(3, 9, 6)
    places = [d for _, d in c.symbols.values()]
    for s, (i, d) in c.symbols.items():
        if d is None:
            args[i] = (3, 9)[places.index(None)] if places.count(None) == 1 else args[i]
        assert s in c.outer_symbols
    assert c.program.hints[next(iter(c.symbols))] in (2, 7)
    values = torch.zeros(2)
    nodes = [n for n in c.program.nodes if n.name in c.positions]
    assert len(c.given(nodes, args, values)) == len(nodes)


def test_a_dim_s_size() -> None:
    c = Captured(Program("p", ()), {}, {S: (0, 1)}, {}, "")
    assert c.sizes([torch.empty(2, 5)]) == {S: 5}
    assert Captured(Program("p", ()), {}, {S: (1, None)}, {}, "").sizes([0, 4]) == {S: 4}


def test_what_the_passes_make_of_it() -> None:
    c = captured(Mlp().double(), tokens(7))
    unit = c.rewritten(2, "t", Options(), "cpu")
    assert (unit.ranks, unit.axis) == (2, "t") and len(unit.bodies) == 1
    assert unit.options.memory_budget != "min"
    with torch.no_grad():
        assert c.rewritten(2, "t", Options(), "cpu").options.memory_budget == "min"
    (body,), (same,) = unit.bodies.values(), c.rewritten(2, "t", Options(), "cpu").bodies.values()
    assert same is body


def test_parameters_in_another_type() -> None:
    c = captured(Mlp(), tokens(7).float(), param_dtype=torch.bfloat16)
    assert any("_to_copy" in op or "aten.to" in op for op in ops(c.program))


def test_gradients_are_derived() -> None:
    def fn(x: Tensor) -> Any:
        y = x * 2
        with torch.no_grad():
            z = y + 1
        return y, z, y.detach() * 3

    c = captured(fn, torch.ones(2, requires_grad=True))
    grads = {n.name: n.type.requires_grad for n in c.program.nodes if n.is_call}
    assert grads["mul"] and not grads["add"] and not grads["mul_1"]


def test_constants() -> None:
    c = captured(lambda x: x + torch.tensor([1.0, 2.0]), torch.ones(2))
    assert [n.kwargs["value"] for n in c.program.nodes if n.op == CONSTANT] in ([[1.0, 2.0]], [])


def test_writes_into_inputs() -> None:
    def fn(x: Tensor, cache: Tensor) -> Any:
        cache.add_(x)
        return cache, cache * 2

    c = captured(fn, torch.ones(2), torch.zeros(2))
    assert [c.names[i] for i in c.writes] == ["cache"]

    def with_gradient(x: Tensor) -> Tensor:
        y = x * 1
        x.data.add_(1)
        return y

    with pytest.raises((UnsupportedError, Exception), match="writes into this input"):
        captured(with_gradient, torch.ones(2, requires_grad=True))


def test_results_are_items() -> None:
    def fn(x: Tensor) -> Any:
        a, b = x.split(1)
        return a + b, x.shape[0]

    c = captured(fn, torch.ones(2), dynamic=False)
    add = next(n for n in c.program.nodes if n.is_call and "add" in str(n.op))
    assert [r.item for r in add.refs()] == [0, 1] and c.program.output.args[0].name == add.name
    assert add.source.startswith("test_capture.py:")


def test_a_graph_break_is_told() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x.tanh()
        torch._dynamo.graph_break()
        return y * 2

    c = captured(fn, torch.ones(2))
    assert "test_capture.py" in c.graph_break
    assert c.rewritten(2, "t", Options(outputs="sharded"), "cpu").options.outputs == "full"


def test_whole_weights_are_placeholders() -> None:
    """A sharded parameter through its module's attribute, and otherwise."""
    mode = FakeTensorMode()
    g = torch.fx.Graph()
    w = g.placeholder("w")
    local = g.call_function(torch.ops.aten.alias.default, (w,))
    g.output(g.call_function(torch.ops.aten.tanh.default, (local,)))
    gm = torch.fx.GraphModule({}, g)
    plain = mode.from_tensor(torch.ones(2))
    assert module._cut_whole_weights(gm, [plain], mode)[1] == [plain]
    sharded = mode.from_tensor(torch.ones(2))
    sharded._spec = None  # type: ignore[attr-defined]
    with pytest.raises(CaptureError, match="w: a sharded parameter is used other than through"):
        module._cut_whole_weights(gm, [sharded], mode)
    from tspc.ops import library  # noqa: F401, PLC0415

    whole = torch.ops.tspc.whole_weight.default
    g = torch.fx.Graph()
    w = g.placeholder("w")
    made = g.call_function(whole, (g.call_function(torch.ops.aten.alias.default, (w,)),))
    g.output(g.call_function(torch.ops.aten.tanh.default, (made,)))
    cut, (fake,) = module._cut_whole_weights(torch.fx.GraphModule({}, g), [sharded], mode)
    assert [n.name for n in cut.graph.nodes] == ["w", "tanh_default", "output"]
    assert isinstance(fake, Tensor) and fake.shape == (2,)
