"""A graph that Dynamo traces again is captured once: its form, and its assumptions made again."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import sympy
import torch
import torch.nn as nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tspc.backend import tsp as backend
from tspc.frontend import capture as front
from tspc.frontend.retrace import assume, assumed, form

TYPES = {"x": torch.zeros(2, 3), "w": torch.zeros(3, 4), "b": torch.zeros(4)}


def graph(order: str, op: Any = torch.add, **held: torch.Tensor) -> torch.fx.GraphModule:
    """x @ w + b, its inputs in this order."""
    g = torch.fx.Graph()
    at = {n: g.placeholder(n) for n in order}
    y = g.call_function(torch.matmul, (at["x"], at["w"]))
    beside = g.get_attr("held") if held else at["b"]
    g.output((g.call_function(op, (y, beside)),))
    return torch.fx.GraphModule(held, g)


def form_of(order: str, op: Any = torch.add, **types: Any) -> Any:
    kinds = [("param" if n != "x" else "input", n) for n in order]
    return form(graph(order, op), kinds, [(TYPES | types)[n] for n in order])


def test_the_order_of_inputs_is_no_part_of_a_form() -> None:
    assert form_of("xwb") == form_of("bwx") != None  # noqa: E711


@pytest.mark.parametrize(
    "other",
    [
        {"op": torch.sub},
        {"x": torch.zeros(5, 3)},
        {"w": torch.zeros(4, 3).t()},
        {"b": torch.zeros(4, dtype=torch.float64)},
        {"b": torch.zeros(4, requires_grad=True)},
    ],
    ids=["op", "size", "strides", "type", "gradient"],
)
def test_what_differs_has_another_form(other: dict[str, Any]) -> None:
    assert form_of("xwb", **other) != form_of("xwb")


def test_graphs_that_are_never_the_same() -> None:
    twice = [("input", "x"), ("input", "x"), ("input", "b")]
    assert form(graph("xwb"), twice, [*TYPES.values()]) is None
    kinds = [("input", n) for n in "xwb"]
    assert form(graph("xwb", held=torch.ones(4)), kinds, [*TYPES.values()]) is None


def sizes(env: ShapeEnv, hint: int) -> dict[sympy.Symbol, torch.SymInt]:
    from torch._dynamo.source import ConstantSource

    s = env.create_symbol(hint, ConstantSource("s"))
    node = env.create_symintnode(s, hint=hint, source=ConstantSource("s"))
    return {sympy.Symbol("n", integer=True, positive=True): node}


def test_assumptions_become_guards_of_another_environment() -> None:
    first, second = ShapeEnv(), ShapeEnv()
    (a,), (b,) = sizes(first, 12).values(), sizes(second, 12).values()
    assert assumed(first, 0) == () and bool(a % 4 == 0) and bool(a > 7)
    guards = assumed(first, 0)
    (symbol,) = set().union(*(g.free_symbols for g in guards))
    assert assume(guards, {symbol: b})
    assert [str(g) for g in assumed(second, 0)] == [str(g) for g in guards]
    assert len(assumed(first, 1)) == len(guards) - 1


def test_an_assumption_that_does_not_hold_or_is_of_other_sizes() -> None:
    n = sympy.Symbol("n", integer=True, positive=True)
    assert not assume([sympy.Gt(n, 20)], sizes(ShapeEnv(), 12))
    assert not assume([sympy.Gt(sympy.Symbol("m"), 2)], sizes(ShapeEnv(), 12))


class Blocks(nn.Module):
    """A matrix product of blocks of four tokens: its capture assumes that there are whole ones."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.down(torch.tanh(self.up(x)))
        return (h.reshape(x.shape[0], -1, 4, 8).mean(2) if x.shape[1] % 4 == 0 else h).square()


def first_calls(lengths: list[int]) -> list[Any]:
    """Of each length: captures, graphs, and the largest difference of results and gradients from a
    plain copy."""
    torch.manual_seed(0)
    plain = Blocks().double()
    model = Blocks().double()
    model.load_state_dict(plain.state_dict())
    counts, real, capture = [0, 0], front.make_fx, backend.capture

    def tracing(*args: Any, **kwargs: Any) -> Any:
        counts[0] += 1
        return real(*args, **kwargs)

    def capturing(*args: Any, **kwargs: Any) -> Any:
        counts[1] += 1
        return capture(*args, **kwargs)

    out: list[Any] = []
    with (
        mock.patch.object(front, "make_fx", tracing),
        mock.patch.object(backend, "capture", capturing),
    ):
        compiled = torch.compile(model, backend="tsp", options={"compiler": "eager"})
        for length in lengths:
            x = torch.randn(2, length, 8, dtype=torch.float64)
            got, expected = compiled(x), plain(x)
            got.sum().backward()
            expected.sum().backward()
            grads = zip(model.parameters(), plain.parameters())
            worst = max((p.grad.full_tensor() - q.grad).abs().max().item() for p, q in grads)  # type: ignore[union-attr]
            out.append((*counts, max((got - expected).abs().max().item(), worst)))
    return out


@pytest.mark.dist
def test_the_first_call_captures_once_and_keeps_its_assumptions(world: Any) -> None:
    for calls in world(2).run(first_calls, lengths=[12, 20, 14, 8, 6]):
        assert calls[0][:2] == (1, 2)  # traced twice by Dynamo
        assert all(error < 1e-12 for *_, error in calls)
        traced, graphs = calls[-1][:2]
        assert traced == graphs - 1


def test_what_is_assumed_before_the_trace_is_kept_too() -> None:
    """Parts that are traced apart, an autograd.Function's and vmap's, assume sizes as well."""
    captures: list[front.Captured] = []
    long: list[list[bool]] = []

    def assuming(gm: torch.fx.GraphModule, fakes: Any, mode: Any) -> None:
        long.append([bool(n > 3) for x in fakes if isinstance(x, torch.Tensor) for n in x.shape])

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        for custom in (assuming, lambda *_: None):
            with mock.patch.object(front.custom, "inlined", custom):
                captures.append(front.capture(gm, inputs))
            front.keep(captures[-1])
        return gm.forward

    torch._dynamo.reset()
    calls = torch.compile(lambda x: x * 2, backend=backend, dynamic=True)
    calls(torch.ones(8, 9))
    assert captures[1].program is captures[0].program and captures[0].guards
    calls(torch.ones(2, 9))  # is not what was assumed
    assert len(captures) == 4 and long == [[True, True], [False, True]]
