"""A second mesh axis of replicas: each has its own batch, gradients are the mean over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.models import call, loss_of, make, tokens_of, whole
from tspc.check import relative_errors

pytestmark = pytest.mark.dist
STEPS, LENGTH, BATCH = 3, 11, 2


def tokens(step: int, micro: int, replica: int) -> torch.Tensor:
    return tokens_of(LENGTH, BATCH, seed=100 * step + 10 * micro + replica)


def train(
    shape: tuple[int, int], names: tuple[str, str], adam: bool, accumulate: int, compiler: str
) -> float:
    """Worst relative error of the updates of 3 clipped steps in float64 against one device on the
    concatenated batch."""
    import tspc

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    replicas, mine = mesh["replicas"].size(), mesh["replicas"].get_local_rank()
    name, ends = "llama_like", []
    for tsp in (False, True):
        torch.manual_seed(dist.get_rank() if tsp else 0)  # all take the first rank's weights
        m = make(name, layers=1)
        if tsp and dist.get_rank():
            with torch.no_grad():
                for p in m.parameters():
                    p.add_(1.0)
        start = {n: p.detach().clone() for n, p in make(name, layers=1).named_parameters()}
        options = {"mesh": mesh, "compiler": compiler}
        fn = torch.compile(m, backend="tsp", options=options, dynamic=True) if tsp else m
        kind = torch.optim.AdamW if adam else torch.optim.SGD
        optimizer = kind(m.parameters(), lr=1e-2, **({"eps": 1e-5} if adam else {}))
        for step in range(STEPS):
            optimizer.zero_grad()
            for micro in range(accumulate):
                every = [tokens(step, micro, r) for r in range(replicas)]
                given = every[mine] if tsp else torch.cat(every)
                (loss_of(fn(**call(name, given, True))) / accumulate).backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            optimizer.step()
        ends.append({n: whole(p.detach()) - start[n] for n, p in m.named_parameters()})
        if tsp:
            assert all(isinstance(p, DTensor) for p in m.parameters())
            assert "fold" in tspc.explain(fn)
    return max(relative_errors(ends[1], ends[0]).values())


@pytest.mark.parametrize(
    "ranks, shape, names, adam, accumulate, compiler",
    [
        (4, (2, 2), ("replicas", "tsp"), False, 1, "inductor"),
        (4, (2, 2), ("tsp", "replicas"), True, 3, "eager"),
        (2, (2, 1), ("replicas", "tsp"), False, 3, "eager"),
    ],
)
def test_equals_one_device_on_all_batches(
    world: Any,
    ranks: int,
    shape: tuple[int, int],
    names: tuple[str, str],
    adam: bool,
    accumulate: int,
    compiler: str,
) -> None:
    case = {"shape": shape, "names": names, "adam": adam, "accumulate": accumulate}
    assert max(world(ranks).run(train, compiler=compiler, **case)) <= 1e-9


def applied() -> float:
    """Gradients after `plan.apply` on the mesh, compiled without naming it again."""
    import tspc

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "tsp"))
    mine = mesh["replicas"].get_local_rank()
    one, m = make("llama_like", layers=1), make("llama_like", layers=1)
    plan = tspc.plan(m, (), call("llama_like", tokens(0, 0, 0), True), mesh=mesh)
    plan.apply(m, mesh)
    fn = torch.compile(m, backend="tsp", options={"compiler": "eager"})
    loss_of(fn(**call("llama_like", tokens(0, 0, mine), True))).backward()
    every = torch.cat([tokens(0, 0, r) for r in range(2)])
    loss_of(one(**call("llama_like", every, True))).backward()
    grads = [{n: whole(p.grad) for n, p in x.named_parameters()} for x in (m, one)]
    return max(relative_errors(*grads).values())


def test_a_plan_applies_on_two_axes(world: Any) -> None:
    assert max(world(4).run(applied)) <= 1e-9
