"""Process groups of this one process: of one rank, with tensors that are stored on its mesh, or of
several, a thread each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tspc.base.options import parse
from tspc.base.state import CALL, GROUP, reset
from tspc.runtime.comm.place import Place
from tspc.runtime.mesh import resolve
from tspc.runtime.params.convert import convert
from tspc.runtime.params.stored import _MESHES, _SEEN

Result = TypeVar("Result")
Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def alone() -> Iterator[DeviceMesh]:
    """A mesh of one rank, while it lasts; no parameters are stored on it yet."""
    _MESHES.clear()
    _SEEN.clear()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,), mesh_dim_names=("tsp",))
    finally:
        dist.destroy_process_group()
        reset(GROUP, CALL)


def cut(x: torch.Tensor, mesh: DeviceMesh, dim: int = 0) -> DTensor:
    return distribute_tensor(x, mesh, [Shard(dim)], src_data_rank=None)


def in_threads(fn: Callable[[int, Any], Result], ranks: int) -> list[Result]:
    """fn(rank, group) on a thread each, over gloo groups of this process."""
    store, limit = dist.HashStore(), timedelta(seconds=20)

    def run(rank: int) -> Result:
        return fn(rank, dist.ProcessGroupGloo(store, rank, ranks, limit))

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


@contextmanager
def stored(model: Model) -> Iterator[tuple[Model, Place]]:
    """The model with its parameters stored on a mesh of one rank, and the rank's place."""
    with alone():
        place, mesh = resolve(parse(None), torch.device("cpu"))
        assert mesh is not None
        convert(model, mesh, place.axis.name, {})
        yield model, place
