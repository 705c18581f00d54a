"""Plans of another model, and models that another library shards or replicates: told on every
rank, with what to do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import _muon

import tspc

EAGER = {"compiler": "eager"}
X = torch.ones(2, 6, 8)


def mlp(width: int = 16, layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    pairs = [(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8)) for _ in range(layers)]
    return nn.Sequential(*(m for pair in pairs for m in pair)).to(dtype)


class Loss(nn.Module):
    """A model of a script, inside of another module."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).square().mean()


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "width": (lambda: mlp(24), r"0.weight is float32\[24, 8\], float32\[16, 8\] in the plan; .*"),
    "more layers": (lambda: mlp(layers=3), "6.weight is float32.*, not there in the plan"),
    "fewer layers": (lambda: mlp(layers=1), "3.weight is not there, float32"),
    "type": (lambda: mlp(dtype=torch.float64), "0.weight is float64.* and 5 more: plan this"),
}


@pytest.fixture(scope="module")
def plan() -> tspc.Plan:
    return tspc.plan(mlp(), (X,), ranks=2)


@pytest.mark.parametrize("other", OTHERS)
def test_a_plan_of_another_model_is_not_applied(plan: tspc.Plan, other: str) -> None:
    build, text = OTHERS[other]
    with pytest.raises(
        tspc.PlanError, match=f"plan.apply.*another model than Sequential: .*{text}"
    ):
        plan.apply(build())


def told(name: str) -> str:
    torch._dynamo.reset()
    try:
        WRAPPED[name]()
    except tspc.TspcError as e:
        return f"{type(e).__name__}: {e}"
    return "nothing"


def planned(model: nn.Module, root: nn.Module | None = None) -> None:
    options = {**EAGER, "plan": tspc.plan(mlp(), (X,), ranks=2)}
    torch.compile(root or model, backend="tsp", options=options)(X)


def of_shards() -> None:
    mesh = init_device_mesh("cpu", (2,))
    compiled(parallelize_module(mlp(), mesh, {"0": ColwiseParallel()}))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="tsp", options=EAGER)(X)


WRAPPED: dict[str, Callable[[], Any]] = {
    "plan": lambda: planned(mlp(24)),
    "plan of a part": lambda: planned(mlp(), Loss(mlp())),
    "DistributedDataParallel in": lambda: compiled(DistributedDataParallel(mlp())),
    "DistributedDataParallel around": lambda: DistributedDataParallel(
        torch.compile(mlp(), backend="tsp", options=EAGER)
    )(X),
    "FullyShardedDataParallel in": lambda: compiled(
        FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"))
    ),
    "FullyShardedDataParallel around": lambda: FullyShardedDataParallel(
        torch.compile(mlp(), backend="tsp", options=EAGER), device_id=torch.device("cpu")
    )(X),
    "fully_shard in": lambda: compiled(fully_shard(mlp(), mesh=init_device_mesh("cpu", (2,)))),
    "a parameter that is a DTensor already": of_shards,
}


@pytest.mark.dist
@pytest.mark.parametrize("name", WRAPPED)
def test_what_does_not_go_together_is_told(world: Any, name: str) -> None:
    for said in world(2).run(told, name=name):
        if name.startswith("plan"):
            part = name.endswith("part")
            assert ("nothing" if part else "another model than Sequential") in said, said
        else:
            assert said.startswith(f"PlanError: backend='tsp' and {name}"), said
            assert "compile the module without it" in said


def dtensors_of_others() -> list[str]:
    """What a DTensor on a mesh that is none of tspc's does otherwise once a model was compiled."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("others",))
    w = torch.arange(12.0).view(4, 3).requires_grad_()

    def used() -> dict[str, Any]:
        x = distribute_tensor(w.detach(), mesh, [Shard(0)])
        before = x._local_tensor
        x.data = w.detach() + 1
        muon = _muon._zeropower_via_newtonschulz
        g = muon(distribute_tensor(w.detach(), mesh, [Replicate()]), (3.4, -4.8, 2.0), 2, 1e-7)
        return {
            "data": x._local_tensor is before and bool(torch.equal(x._local_tensor, before)),
            "numpy": _said(lambda: distribute_tensor(w.detach(), mesh, [Shard(0)]).numpy()),
            "sum": _said(lambda: x.sum()._local_tensor.item()),
            "pickle": len(pickle.dumps(x.detach())) > 0,
            "muon": g.placements,
        }

    before = used()
    model = Loss(mlp())
    torch.compile(model, backend="tsp", options=EAGER)(X).backward()
    after = used()
    return [k for k in before if before[k] != after[k]]


def _said(fn: Callable[[], Any]) -> str:
    """The value, or the kind of the error."""
    try:
        return str(fn())
    except Exception as e:
        return type(e).__name__


@pytest.mark.dist
def test_dtensors_of_others_are_as_torch_has_them(world: Any) -> None:
    assert world(2).run(dtensors_of_others) == [[], []]
