"""Stored parameters met by plain code, by brute force: each op on a sharded parameter and on the
plain tensor, on 2 and 3 real ranks, values and gradients; noise; other people's DTensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.support.stored_values import READ, WRITE, lines
from tspc.base.errors import ShardedParameterError
from tspc.runtime.params.gradients import arrives_cut
from tspc.runtime.params.stored import is_stored
from tspc.runtime.params.values import store_on
from tspc.seams.compiler import assign_data_of_shards

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
        total.backward()  # pyright: ignore[reportAttributeAccessIssue]
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


def compare(ranks: int, shapes: list[str], grads: bool) -> list[str]:
    """What is not one device's."""
    mesh, wrong = mesh_of(ranks), []
    assign_data_of_shards(is_stored, ShardedParameterError)
    for shape_name in shapes:
        shape, dim = SHAPES[shape_name]
        plain = values(shape)
        mine = dict(plain)
        for k in ("p", "g"):
            placements = [Replicate() if dim is None else Shard(dim)]
            mine[k] = distribute_tensor(plain[k], mesh, placements)
        for grad in (False, True) if grads else (False,):
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


@pytest.mark.parametrize(
    "ranks, shapes, grads", [(2, list(SHAPES), True), (3, ["uneven", "empty"], False)]
)
def test_each_op_gives_one_device_s_value(
    world: Any, ranks: int, shapes: list[str], grads: bool
) -> None:
    for wrong in world(ranks).run(compare, ranks=ranks, shapes=shapes, grads=grads):
        assert not wrong, f"{len(wrong)}\n" + "\n".join(wrong[:40])


def over_replicas() -> dict[str, float]:
    """How far a loss of each replica's own, through a plain tensor and a stored one, is off."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tsp", "replicas"))
    store_on(mesh)
    made = torch.Generator().manual_seed(0)
    w, *h = (torch.randn(n, 4, dtype=torch.float64, generator=made) for n in (11, 3, 3))
    mine, off = mesh.get_local_rank(1), {}

    def loss(w: Any, h: Any) -> Any:
        return F.linear(h, w).pow(2).mean() + (h.sum(0) * w).sin().sum() + w.pow(2).sum()

    one = w.clone().requires_grad_()
    inputs = [x.clone().requires_grad_() for x in h]
    losses = [loss(one, x) for x in inputs]
    torch.stack(losses).mean().backward()
    for cut in (Replicate(), Shard(0)):
        p = torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(0), cut]))
        arrives_cut(p)
        x = h[mine].clone().requires_grad_()
        value = loss(p, x)
        value.backward()
        assert type(value) is torch.Tensor and p.grad is not None and x.grad is not None
        assert p.grad.placements == p.placements  # pyright: ignore[reportAttributeAccessIssue]
        found = {
            "loss": value - losses[mine],
            "of the weight": p.grad.full_tensor() - one.grad,  # pyright: ignore[reportAttributeAccessIssue]
            "of the input": x.grad / 2 - inputs[mine].grad,  # pyright: ignore[reportAttributeAccessIssue]
            "norm": p.norm() - w.norm(),
            "spread": p.std() - w.std(),
        }
        off |= {f"{k} {cut}": float(v.detach().abs().max()) for k, v in found.items()}
    return off


def test_replicas_have_losses_of_their_own(world: Any) -> None:
    for off in world(4).run(over_replicas):
        assert max(off.values()) < 1e-12, off


def drawn() -> list[Any]:
    """Noise for a stored tensor and for a plain one after it; with generators that differ."""
    w = torch.zeros(11, 3)
    p = distribute_tensor(w, mesh_of(2), [Shard(0)])
    torch.manual_seed(5)
    found = [torch.randn_like(p).full_tensor(), torch.rand_like(p).full_tensor(), torch.rand(2)]
    torch.manual_seed(7 + dist.get_rank())
    found += [p.normal_().full_tensor(), torch.rand(2)]
    given = torch.Generator().manual_seed(3)
    return [*found, p.bernoulli_(0.4, generator=given).full_tensor()]


def test_noise_is_one_device_s(world: Any) -> None:
    torch.manual_seed(5)
    wanted = [torch.randn(11, 3), torch.rand(11, 3), torch.rand(2)]
    torch.manual_seed(7)
    wanted += [torch.randn(11, 3), torch.rand(2)]
    given = torch.Generator().manual_seed(3)
    wanted += [torch.zeros(11, 3).bernoulli_(0.4, generator=given)]
    first, second = world(2).run(drawn)
    assert all(map(torch.equal, first, wanted))
    torch.manual_seed(8)
    wanted[4] = torch.rand(2)  # a generator of a rank's own goes its own way
    assert all(map(torch.equal, second, wanted))


def others() -> list[str]:
    """What DTensors on a mesh of the user's own do, beside ours."""
    mesh_of(2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("theirs",))
    x = torch.arange(10.0).view(5, 2)
    d = distribute_tensor(x, mesh, [Shard(0)])
    found = [str(v.placements) for v in (d.norm(), d.sum(), d[:1], d.t(), d + d, d.argmax())]
    found += [str(torch.equal(d, d)), str(d.add_(1).placements), str(d.sum().full_tensor().item())]
    for act in (lambda: d + x, lambda: d.tolist(), lambda: d.numpy()):
        try:
            act()
        except RuntimeError as e:
            found.append(str(e)[:32])
    return found


def test_other_people_s_dtensors_are_torch_s(world: Any) -> None:
    for found in world(2).run(others):
        assert found == [
            *("(_NormPartial(2),)", "(Partial(sum),)", "(Replicate(),)", "(Shard(dim=1),)"),
            *("(Shard(dim=0),)", "(Replicate(),)", "True", "(Shard(dim=0),)", "55.0"),
            "aten.add.Tensor: got mixed torch",
            ".tolist() is not supported for t",
            ".numpy() is not supported for te",
        ]
