"""What was computed from whole parameters before the first call, beside replicas, and when it is
freed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from tests.parity.habits import tokens
from tests.parity.habits.breaks import chain
from tests.support.models import whole

pytestmark = pytest.mark.dist


def loss_of(model: nn.Module, body: Any, ids: torch.Tensor) -> torch.Tensor:
    h = body(model.first(model.embed(ids)))
    return F.cross_entropy(model.head(h).flatten(0, 1), ids.flatten())


def gradients() -> tuple[float, list[int]]:
    """The worst error of a gradient on a mesh of 2 replicas; the elements of the whole weights that
    are in memory before the backward and after the next step."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "tsp"))
    torch.manual_seed(0)
    model = chain()
    one, olds = copy.deepcopy(model), list(model.parameters())
    options = {"compiler": "eager", "mesh": mesh, "axis": "tsp"}
    body = torch.compile(model.body, backend="tsp", options=options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def held() -> int:
        with torch._C.DisableTorchFunctionSubclass():
            return sum(p.numel() for p in olds)

    loss = loss_of(model, body, tokens(9, mesh.get_local_rank("replicas")))
    counts = [held()]
    loss.backward()
    del loss
    optimizer.step()
    counts.append(held())
    (sum(loss_of(one, one.body, tokens(9, i)) for i in range(2)) / 2).backward()
    errors = [
        float((whole(p.grad) - q.grad).abs().max() / q.grad.abs().max())
        for p, q in zip(model.parameters(), one.parameters())
    ]
    return max(errors), counts


def test_gradients_are_means_over_replicas(world: Any) -> None:
    outside = 187 * 16 + 16 * 16 + 16  # the table and the first layer
    for error, counts in world(2).run(gradients):
        assert error < 1e-12
        assert counts[0] >= outside > 0 == counts[1]
