"""The backend on real ranks: what it compiles, what it refuses, how results leave."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
import torch.nn as nn

from tests.support.tiny import Attention, Cached, Mlp, tokens
from tspc.backend import tsp as module
from tspc.backend.tsp import GRAPHS, _device, _output_names, _require, tsp
from tspc.base.errors import InternalError
from tspc.frontend.capture import Captured
from tspc.ir.program import Program

Tensor = torch.Tensor
S = sympy.Symbol("s", positive=True, integer=True)


def trained(kind: type[nn.Module], **options: Any) -> tuple[float, dict[str, float], list[str]]:
    """(loss, norms of gradients, how each parameter is stored) of a rank, through the backend; and
    that a second call has other sizes."""
    torch.manual_seed(0)
    model = kind().double()
    compiled = torch.compile(
        model, backend="tsp", options={"compiler": "eager", **options}, dynamic=True
    )
    compiled(tokens(9))
    model.zero_grad()
    out = compiled(tokens())
    loss = out[0] if isinstance(out, tuple) else out
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    norms = {n: float(g.full_tensor().norm()) for n, g in grads.items() if g is not None}  # type: ignore[operator]
    graphs = [g for root in GRAPHS for g in GRAPHS[root]]
    assert graphs and graphs[-1].sizes
    return float(loss.detach()), norms, [str(p.placements[0]) for p in model.parameters()]  # type: ignore[attr-defined]


def one_device(kind: type[nn.Module]) -> tuple[float, dict[str, float]]:
    torch.manual_seed(0)
    model = kind().double()
    out = model(tokens())
    loss = out[0] if isinstance(out, tuple) else out
    loss.backward()
    return float(loss.detach()), {n: float(p.grad.norm()) for n, p in model.named_parameters()}


@pytest.mark.dist
@pytest.mark.parametrize("kind", [Mlp, Attention, Cached])
def test_as_on_one_device(world: Any, kind: type[nn.Module]) -> None:
    loss, norms = one_device(kind)
    for got, grads, stored in world(2).run(trained, kind=kind):
        assert got == pytest.approx(loss) and grads == pytest.approx(norms)
        assert any("S(" in s for s in stored)


@pytest.mark.dist
@pytest.mark.slow
def test_through_inductor(world: Any) -> None:
    loss, norms = one_device(Mlp)
    options = {"compiler": "inductor", "check_nan": True, "outputs": "sharded"}
    for got, grads, _ in world(2).run(trained, kind=Mlp, **options):
        assert got == pytest.approx(loss) and grads == pytest.approx(norms)


def refused() -> list[str]:
    out = []
    for options in ({"strict": True}, {"mode": "max-autotune"}):
        torch._dynamo.reset()
        mode = options.pop("mode", None)
        given: Any = None if mode else {"compiler": "eager", **options}
        try:
            fn = torch.compile(
                lambda x: x.tanh().cumprod(1).mean(), backend="tsp", options=given, mode=mode
            )
            fn(tokens())
            out.append("")
        except Exception as e:
            out.append(str(e))
    return out


@pytest.mark.dist
def test_what_is_refused(world: Any) -> None:
    for texts in world(2).run(refused):
        assert "works on one rank only" in texts[1], texts


def test_on_one_rank_it_is_inductor() -> None:
    with pytest.raises(Exception, match="mode='fast'"):
        tsp(torch.fx.GraphModule({}, torch.fx.Graph()), [], mode="fast")


def test_the_device_of_a_graph() -> None:
    meta, cpu = torch.ones(1, device="meta"), nn.Parameter(torch.ones(1))
    assert _device([3, meta, cpu]) == torch.device("cpu") and _device([3]) == torch.device("cpu")
    assert _device([3, meta]) == torch.device("meta")


def test_an_assumption_that_does_not_hold() -> None:
    _require(sympy.Ge(S, 2), {S: 3})
    with pytest.raises(
        InternalError, match="the local program assumes s >= 2, which does not hold"
    ):
        _require(sympy.Ge(S, 2), {S: 1})


def test_names_of_results() -> None:
    captured = Captured(Program("p", ()), {"cache": 1}, {}, {}, "", writes=(1,))
    assert _output_names(captured, 3) == ["output 0", "output 1", "the new value of cache"]
    assert module.GRAPHS is GRAPHS
