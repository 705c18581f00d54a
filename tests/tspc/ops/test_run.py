"""The interpreter: constants, sizes, results, gradients, what stands for what is made."""

from __future__ import annotations

import pytest
import sympy
import torch

from tspc.ir.body import STEP, Piece
from tspc.ir.program import CONSTANT, Node, Program, Ref, Type
from tspc.ops.run import LocalProgram, Run, _Kept, _leaving, run_piece

aten = torch.ops.aten
S = sympy.Symbol("s", positive=True, integer=True)
T = (Type((2,), torch.float32),)
CPU = torch.device("cpu")


def after(*nodes: Node, **values: torch.Tensor) -> dict[str, torch.Tensor]:
    run = Run(dict(values), {S: 3}, CPU)
    assert run.nodes(nodes) == []
    return run.values


def test_constants() -> None:
    n = Node("c", CONSTANT, kwargs={"value": [[1, 2]]}, types=(Type((1, 2), torch.int32),))
    x = after(n)["c"]
    assert x.dtype == torch.int32 and x.tolist() == [[1, 2]]


def test_sizes_and_lists() -> None:
    x = torch.arange(6.0)
    nodes = (
        Node("v", aten.reshape.default, (Ref("x"), (S - 1, S))),
        Node("c", aten.cat.default, ((Ref("v"), Ref("v", 0)), 1)),
        Node("a", aten.arange.default, (S * 2,)),
    )
    values = after(*nodes, x=x)
    assert values["v"].shape == (2, 3) and values["c"].shape == (2, 6)
    assert values["a"].tolist() == [*range(6)]


def test_a_view_of_what_is_not_viewable() -> None:
    x = torch.arange(12).view(3, 4).t()
    node = Node("v", aten.view.default, (Ref("x"), (12,)))
    assert torch.equal(after(node, x=x)["v"], x.reshape(12))


def test_several_results_are_items() -> None:
    node = Node("p", aten.split.Tensor, (Ref("x"), 2), types=(*T, None))
    values = after(node, x=torch.arange(4.0))
    assert values["p"].tolist() == [0, 1] and values["p[1]"].tolist() == [2, 3]


def test_autograd_follows_what_the_types_say() -> None:
    x = torch.ones(2, requires_grad=True)
    grad = (Type((2,), torch.float32, True),)
    nodes = (
        Node("y", aten.sin.default, (Ref("x"),), types=T),
        Node("z", aten.sin.default, (Ref("x"),), types=grad),
    )
    values = after(*nodes, x=x)
    assert not values["y"].requires_grad and values["z"].requires_grad


def test_what_is_kept_stands_for_what_is_made() -> None:
    x, kept = torch.ones(2, requires_grad=True), torch.full((2,), 5.0)
    nodes = tuple(
        Node(n, aten.mul.Tensor, (Ref(m), Ref(STEP))) for n, m in (("y", "x"), ("z", "y"))
    )
    values = run_piece(Piece(("x",), ("z",), nodes), {}, torch.tensor(3.0), {"x": x}, {"y": kept})
    assert values["y"].tolist() == [5, 5] and values["z"].tolist() == [15, 15]
    values["z"].sum().backward()
    assert x.grad is not None and x.grad.tolist() == [9, 9]
    value = torch.zeros(2, requires_grad=True)
    y = _Kept.apply(torch.ones(2), value)
    y.backward(torch.tensor([3.0, 4.0]))
    assert y.tolist() == [1, 1] and value.grad is not None and value.grad.tolist() == [3, 4]


def program(*nodes: Node) -> Program:
    return Program("p", (Node("x", "input", types=T), *nodes))


def test_a_local_program() -> None:
    y = Node("y", aten.mul.Tensor, (Ref("x"), S))
    local = LocalProgram(program(y, Node("output", "output", (Ref("y"), S + 1, None))), [S])
    out = local(4, torch.ones(2))
    assert out[0].tolist() == [4, 4] and out[1:] == [5, None]  # type: ignore[union-attr]


def test_what_a_checkpointed_part_makes_for_others() -> None:
    nodes = []
    for name, of, group in (("a", "x", 1), ("b", "a", 1), ("c", "b", 0), ("d", "b", 2)):
        nodes.append(Node(name, aten.tanh.default, (Ref(of),), {}, T, recompute=group))
    output = Node("output", "output", (Ref("c"), Ref("d")))
    assert _leaving(program(*nodes, output)) == {"b", "d"}


def test_its_ops_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    real = torch.ops.aten.tanh.default

    class Context:
        def __init__(self, group: int, leaves: bool):
            seen.append((group, leaves))

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("tspc.ops.run.recomputed", Context)
    nodes = (
        Node("a", real, (Ref("x"),), {}, T, recompute=1),
        Node("b", real, (Ref("a"),), {}, T, recompute=1),
        Node("output", "output", (Ref("b"),)),
    )
    LocalProgram(program(*nodes), [])(torch.ones(2))
    assert seen == [(1, False), (1, True)]
