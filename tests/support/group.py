"""A process group of this one process, and tensors that are stored on its mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tspc.base.state import CALL, GROUP, reset


@contextmanager
def alone() -> Iterator[DeviceMesh]:
    """A mesh of one rank, while it lasts."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,), mesh_dim_names=("tsp",))
    finally:
        dist.destroy_process_group()
        reset(GROUP, CALL)


def cut(x: torch.Tensor, mesh: DeviceMesh, dim: int = 0) -> DTensor:
    return distribute_tensor(x, mesh, [Shard(dim)], src_data_rank=None)
