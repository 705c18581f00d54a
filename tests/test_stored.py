"""Stored parameters met by plain code, by brute force: each op on a sharded parameter and on the
plain tensor, on 2 and 3 real ranks, values and gradients; noise; other people's DTensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.stored_values import READ, WRITE, lines
from tspc.runtime.gradients import arrives_cut
from tspc.runtime.values import store_on
from tspc.torch_seams import assign_data_of_shards

pytestmark = pytest.mark.dist
SHAPES = {
    "uneven": ((11, 4), 0),
    "columns": ((4, 11), 1),
    "empty": ((1, 3), 0),
    "whole": ((3, 5), None),
}


def mesh_of(ranks: int) -> DeviceMesh:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tsp",))
    store_on(mesh)
    return mesh


def values(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(sum(shape))
    p, g, h = (torch.randn(shape, dtype=torch.float64, generator=made) for _ in range(3))
    return {"p": p, "g": g, "h": h, "v": h[0].clone() + 1, "s": h[0, 0].clone(), "m": g > 0.3}


def evaluate(text: str, made: Mapping[str, Any], grad: bool) -> Any:
    """The value, and what its gradients are."""
    names = {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in made.items()}
    leaves = [k for k in ("p", "h", "v", "s") if grad]
    for k in leaves:
        names[k] = made[k].detach().clone().requires_grad_()
        if isinstance(names[k], DTensor):
            arrives_cut(names[k])
    names["q"], names["h2"] = names["p"].detach().clone(), names["h"].detach().clone()
    try:
        out = eval(text, {"torch": torch, "np": np}, names)
    except Exception as e:
        return e
    if not grad:
        return out
    flat = [x for x in torch.utils._pytree.tree_leaves(out) if getattr(x, "requires_grad", False)]
    if not flat:
        return None
    try:
        total = sum(
            (x.double() * torch.cos(torch.arange(x.numel()).view(x.shape))).sum() for x in flat
        )
        total.backward()  # pyright: ignore
    except Exception as e:
        return e
    grads = [names[k].grad for k in leaves]
    p = names["p"]
    if isinstance(p, DTensor) and p.grad is not None and p.grad.placements != p.placements:
        return f"the gradient is {p.grad.placements}"
    if any(isinstance(g, DTensor) for g in grads[1:]):
        return "a plain tensor's gradient is a DTensor"
    return [total.detach(), *grads]


def differs(a: Any, b: Any) -> bool:
    if isinstance(b, (list, tuple)):
        return len(a) != len(b) or any(differs(x, y) for x, y in zip(a, b))
    if isinstance(b, torch.Tensor):
        if not isinstance(a, torch.Tensor):
            return True
        a = (a.full_tensor() if isinstance(a, DTensor) else a).detach()
        if a.shape != b.shape or a.dtype != b.dtype:
            return True
        return not torch.allclose(a, b.detach(), 1e-9, 1e-12, equal_nan=True)
    if isinstance(b, np.ndarray):
        return not np.array_equal(a, b)
    return a != b and not (isinstance(b, float) and abs(a - b) <= 1e-9 * abs(b))


def compare(ranks: int) -> list[str]:
    """What is not one device's."""
    mesh, wrong = mesh_of(ranks), []
    assign_data_of_shards()
    for shape_name, (shape, dim) in SHAPES.items():
        plain = values(shape)
        mine = dict(plain)
        for k in ("p", "g"):
            placements = [Replicate() if dim is None else Shard(dim)]
            mine[k] = distribute_tensor(plain[k], mesh, placements)
        for grad in (False, True):
            for text in lines(READ) + ([] if grad else lines(WRITE)):
                one = evaluate(text, plain, grad)
                if isinstance(one, Exception):
                    continue
                many = evaluate(text, mine, grad)
                if isinstance(many, Exception):
                    wrong.append(f"{shape_name} {text}: {type(many).__name__} {str(many)[:300]}")
                elif differs(many, one):
                    wrong.append(f"{shape_name} {text} grad={grad}: {many} for {one}"[:500])
    return wrong


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_op_gives_one_device_s_value(world: Any, ranks: int) -> None:
    for wrong in world(ranks).run(compare, ranks=ranks):
        assert not wrong, f"{len(wrong)}\n" + "\n".join(wrong[:40])
