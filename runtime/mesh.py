"""The TSP axis of a run: which mesh dim, this rank's place on it, and its process groups over the
same ranks: weights, activations, and checks on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tspc.runtime.execute import PLACES, Place
from tspc.runtime.requests import Axis

from tspc.errors import PlanError
from tspc.options import Options

_WORLD: dict[str, DeviceMesh] = {}


def resolve(options: Options, device: torch.device) -> tuple[Place, DeviceMesh | None]:
    """The place of this rank and the one-dim mesh of the axis; without a process group an axis of
    one rank."""
    if not dist.is_initialized():
        if options.mesh is not None:
            raise PlanError("a mesh was given but no process group is initialized")
        return Place(Axis("tsp", 1, 0)), None
    mesh = options.mesh
    move = f"model.to({mesh.device_type!r})" if mesh is not None else "model.to(device)"
    if device.type == "meta":
        move = move.replace("to(", "to_empty(device=") + " and load or initialise it"
    if mesh is None:
        if device.type == "meta":
            raise PlanError(f"the model is on meta, where nothing runs: {move} first")
        kind = device.type
        if kind not in _WORLD or _WORLD[kind].size() != dist.get_world_size():
            _WORLD[kind] = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("tsp",))
        mesh = _WORLD[kind]
    mesh = _axis(mesh, options.axis)
    if mesh.device_type != device.type:
        raise PlanError(
            f"the model is on {device.type}, the mesh on {mesh.device_type}: {move} first"
        )
    group = mesh.get_group()
    ranks = dist.get_process_group_ranks(group)
    names = mesh.mesh_dim_names
    name = f"{names[0] if names else 'tsp'}_{'_'.join(map(str, ranks))}"
    if name not in PLACES:
        second: Any = dist.new_group(ranks, use_local_synchronization=True)
        third: Any = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        axis = Axis(name, len(ranks), dist.get_rank(group))
        groups = {"weights": second, "activations": group, "checks": third}
        PLACES[name] = Place(axis, groups)
    return PLACES[name], mesh


def _axis(mesh: DeviceMesh, axis: str | None) -> DeviceMesh:
    names = mesh.mesh_dim_names or ()
    if mesh.size() != max(mesh.shape):
        raise PlanError(
            f"the mesh is {tuple(mesh.shape)}: a second axis (data parallel) is not supported yet"
        )
    if axis is not None:
        if axis not in names:
            raise PlanError(
                f"the mesh has no axis {axis!r}; its axes are {', '.join(names) or 'unnamed'}"
            )
        return mesh[axis]
    if mesh.ndim == 1:
        return mesh
    if "tsp" in names:
        return mesh["tsp"]
    raise PlanError(f"name the axis to fold on: options={{'axis': ...}}, one of {', '.join(names)}")
