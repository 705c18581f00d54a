"""Parameters become shards while the first graph is compiled: what Dynamo traced before holds, and
what people do with parameters around it is as on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import tspc
from tests.support.models import whole
from tspc.backend import tsp as backend
from tspc.backend.tsp import GRAPHS

pytestmark = pytest.mark.dist


class Blocks(nn.Module):
    """A mean over blocks of four tokens where there are whole ones: its length is read."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.down(torch.tanh(self.up(x)))
        return (h.reshape(x.shape[0], -1, 4, 8).mean(2) if x.shape[1] % 4 == 0 else h).square()


class Regularised(Blocks):
    """Takes its parameters past their modules' attributes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.1 * sum(p.square().sum() for p in self.parameters())


class Returned(Blocks):
    """Its results hold a parameter."""

    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(x), self.up.weight


class Graded(Blocks):
    """Reads a gradient in its forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g = self.up.weight.grad
        if g is not None:
            self.seen = g.norm()
        return super().forward(x)


class Evaluated(Blocks):
    """Is evaluated at each length before it is trained."""


class Tied(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.down.weight = self.up.weight


class Broken(Blocks):
    """A weight is held over a break of the graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.up.weight
        h = super().forward(x)
        torch._dynamo.graph_break()
        return h + (x @ w.T).sum()


class Grown(Blocks):
    """Its first call makes a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.LazyLinear(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def of_model(m: nn.Module) -> Callable[[torch.Tensor], Any]:
    return m


def of_function(m: nn.Module) -> Callable[[torch.Tensor], Any]:
    return lambda x: m(x)


def of_argument(m: nn.Module) -> Callable[[torch.Tensor], Any]:
    raise NotImplementedError  # the model is an argument: see `calls`


def calls(cls: type[Blocks], way: Callable[..., Any], lengths: list[int]) -> dict[str, Any]:
    """Of a plain and a compiled copy, an optimizer's step after each call: the largest difference
    of results, gradients and parameters; and how many graphs there were after the first call."""
    torch.manual_seed(0)
    plain, model = (cls().double() for _ in range(2))
    if cls is Grown:
        for m in (plain, model):
            m(torch.zeros(1, 4, 8, dtype=torch.float64))
    model.load_state_dict(plain.state_dict())
    graphs, capture = [0], backend.capture

    def capturing(*args: Any, **kwargs: Any) -> Any:
        graphs[0] += 1
        return capture(*args, **kwargs)

    options = {"compiler": "eager"}
    if way is of_argument:
        step = torch.compile(lambda m, x: m(x), backend="tsp", options=options)
        compiled: Any = lambda x: step(model, x)  # noqa: E731
    else:
        compiled = torch.compile(way(model), backend="tsp", options=options)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (plain, model)]
    counts, worst = [], 0.0
    with mock.patch.object(backend, "capture", capturing):
        for length in lengths:
            if cls is Evaluated:  # of a length that is traced here first
                with torch.inference_mode():
                    compiled(torch.randn(3, length, 8, dtype=torch.float64))
            x = torch.randn(2, length, 8, dtype=torch.float64)
            outs = [fn(x) for fn in (plain, compiled)]
            outs = [list(o) if isinstance(o, tuple) else [o] for o in outs]
            for o in outs:
                sum(v.sum() for v in o).backward()
            counts.append(graphs[0])
            pairs = list(zip(*outs))
            for p, q in zip(plain.parameters(), model.parameters()):
                assert isinstance(q, DTensor)
                pairs += [(p.grad, q.grad), (p, q)]
            differences = [whole(a.detach()) - whole(b.detach()) for a, b in pairs]
            worst = max(worst, *(d.abs().max().item() for d in differences))
            for o in optimizers:
                o.step()
            for p in (*plain.parameters(), *model.parameters()):
                p.grad = None if cls is not Graded else torch.zeros_like(p) + 0.25
    lengthwise = len(GRAPHS[model]) if model in GRAPHS else 0
    return {"graphs": counts, "worst": worst, "kept": lengthwise}


LENGTHS = [12, 20, 14, 8, 6]


@pytest.mark.parametrize("way", [of_model, of_function, of_argument])
def test_a_model_is_traced_once_and_serves_every_length(world: Any, way: Any) -> None:
    for r in world(2).run(calls, cls=Blocks, way=way, lengths=LENGTHS):
        assert r["graphs"][0] == 1
        assert r["graphs"][-1] <= 4 and r["worst"] < 1e-12
        assert r["kept"] == r["graphs"][-1]  # none runs op by op on the shards


@pytest.mark.parametrize("cls", [Regularised, Returned, Graded, Evaluated, Tied, Broken, Grown])
def test_what_people_do_with_parameters(world: Any, cls: type[Blocks]) -> None:
    for r in world(2).run(calls, cls=cls, way=of_model, lengths=[12, 20, 12]):
        assert r["worst"] < 1e-12


def on_two_meshes() -> list[float]:
    """Of two models of one class, stored on meshes whose ranks stand in another order."""
    worst, alive = [], []
    for order in ([0, 1], [1, 0]):
        torch.manual_seed(0)
        plain, model = Blocks().double(), Blocks().double()
        model.load_state_dict(plain.state_dict())
        x = torch.randn(2, 12, 8, dtype=torch.float64)
        mesh = DeviceMesh("cpu", order, mesh_dim_names=("tsp",))
        tspc.plan(model, (x,), mesh=mesh).apply(model)
        out = torch.compile(model, backend="tsp", options={"compiler": "eager"})(x)
        out.sum().backward()
        plain(x).sum().backward()
        pairs = [(out.detach(), plain(x).detach())]
        pairs += [(q.grad, p.grad) for p, q in zip(plain.parameters(), model.parameters())]
        alive.append(model)  # and with it the classes of its modules
        worst.append(max((whole(a) - b).abs().max().item() for a, b in pairs))
    return worst


def test_a_graph_of_one_mesh_is_not_taken_for_another(world: Any) -> None:
    for worst in world(2).run(on_two_meshes):
        assert max(worst) < 1e-12
