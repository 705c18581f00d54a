"""A traced graph as a program: constants, types, sizes, names, gradients."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tspc.base.errors import CaptureError
from tspc.frontend.from_fx import _Conversion, constant, convert, divided, type_of
from tspc.ir.program import INPUT, OUTPUT, Ref
from tspc.seams.sizes import FloorDiv
from tspc.seams.tensors import FakeTensorMode

Tensor = torch.Tensor
S = sympy.Symbol("s", positive=True, integer=True)


def test_constants() -> None:
    n = constant("c", torch.tensor([[3]]))
    assert n.kwargs == {"value": [[3]]} and n.type.shape == (1, 1)
    with FakeTensorMode() as mode, pytest.raises(CaptureError, match="c: a constant of the model"):
        constant("c", mode.from_tensor(torch.ones(2)))


def test_types_and_exact_divisions() -> None:
    t = type_of(torch.ones(2, 3), True)
    assert (
        t.shape == (2, 3) and t.requires_grad and not type_of(torch.arange(2), True).requires_grad
    )
    assert type_of(torch.ones(2, dtype=torch.complex64), True).requires_grad
    assert divided(FloorDiv(S**2, S)) == S and divided(S + 1) == S + 1
    assert divided(FloorDiv(S, 2)) != S / 2 and divided(FloorDiv(S, 2)).subs(S, 5) == 2


def test_a_graph() -> None:
    def fn(x: Tensor, y: Tensor) -> list[object]:
        first, second = (x * y).split(1)
        return [first.detach() + second, x.shape[0], torch.zeros(2)]

    gm = make_fx(fn, pre_dispatch=True)(torch.ones(2, 3), torch.ones(2, 3))
    kinds = [(INPUT, "same"), (INPUT, "same")]
    program, positions = convert("p", gm, kinds, [True, False], {S: 4})
    assert positions == {"same": 0, "same_1": 1} and program.hints == {S: 4}
    grads = {n.name: [t.requires_grad for t in n.types if t] for n in program.nodes if n.is_call}
    assert grads["mul"] == [True] and grads["split"] == [True, True] and grads["detach"] == [False]
    assert grads["add"] == [True] and program.output.op == OUTPUT
    assert program.node("detach").args == (Ref("split", 0),) and program.output.args[1] == 2


def test_names_are_unique() -> None:
    conversion = _Conversion(torch.fx.GraphModule({}, torch.fx.Graph()))
    assert [conversion.unique(n) for n in ("a", "a", "b", "a")] == ["a", "a_1", "b", "a_2"]
