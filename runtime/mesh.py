"""The TSP axis of a run: which mesh dim, this rank's place on it, its process groups over the same
ranks (weights, activations, and checks on the CPU) with the timeout of the given one, and the
replicas on the other mesh dim.

Parameters are stored on the mesh of the axis, or of the axis and then the replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from tspc.base.errors import PlanError
from tspc.base.options import Options
from tspc.base.state import GROUP, remembered, reset
from tspc.runtime.comm.launched import join, runs_on
from tspc.runtime.comm.place import PLACES, Place
from tspc.runtime.comm.requests import Axis
from tspc.seams.compiler import forget_specs, timeout_of

_WORLD: dict[str, DeviceMesh] = remembered(GROUP, {})


@dataclass(frozen=True)
class Axes:
    """The axis to fold on, the data-parallel one if there is one, and what parameters are stored
    on."""

    tsp: DeviceMesh
    replicas: DeviceMesh | None
    storage: DeviceMesh


# by identity: (a mesh of two axes, the name of one) or a mesh that parameters are stored on
_AXES: dict[object, Axes] = remembered(GROUP, {})
_KEPT: list[DeviceMesh] = remembered(GROUP, [])
_OVER: list[object] = remembered(GROUP, [])  # the default group that all of these were made over


def resolve(
    options: Options, device: torch.device, planned: bool = False
) -> tuple[Place, DeviceMesh | None]:
    """The place of this rank and the mesh that parameters are stored on; without a process group
    that of the launcher is made, and without one an axis of one rank.

    planned: nothing runs yet, so that parameters may be on meta.
    """
    if not dist.is_initialized():
        if options.mesh is not None:
            raise PlanError("a mesh was given but no process group is initialized")
        if not join(device):
            return Place(Axis("tsp", 1, 0)), None
    _forget()
    mesh = options.mesh
    move = f"model.to({mesh.device_type!r})" if mesh is not None else "model.to(device)"
    if device.type == "meta":
        move = move.replace("to(", "to_empty(device=") + " and load or initialise it"
    if mesh is None:
        kind = runs_on(device) if planned else device.type
        if kind == "meta":
            raise PlanError(f"the model is on meta, where nothing runs: {move} first")
        if kind not in _WORLD or _WORLD[kind].size() != dist.get_world_size():
            _WORLD[kind] = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("tsp",))
        mesh = _WORLD[kind]
    axes = _axes(mesh, options.axis)
    if mesh.device_type != device.type and not (planned and device.type == "meta"):
        raise PlanError(
            f"the model is on {device.type}, the mesh on {mesh.device_type}: {move} first"
        )
    try:
        ranks = dist.get_process_group_ranks(axes.tsp.get_group())
    except KeyError:
        raise PlanError(
            "the mesh, or what the parameters are stored on, is of a process group that was "
            "destroyed: make the mesh and the model again, and load its state"
        ) from None
    names = axes.tsp.mesh_dim_names
    name = f"{names[0] if names else 'tsp'}_{'_'.join(map(str, ranks))}"
    if axes.replicas is not None:
        name += f"_of_{axes.replicas.size()}"
    if name not in PLACES:
        PLACES[name] = _place(name, axes)
    return PLACES[name], axes.storage


def _forget() -> None:
    """What was made over a default group that has been destroyed."""
    if _OVER != [dist.group.WORLD]:
        if _OVER:
            forget_specs()
        reset(GROUP)
        _OVER.append(dist.group.WORLD)


def renew(place: Place, options: Options, stored: Sequence[DTensor], device: torch.device) -> None:
    """Before a call: a place over a default group that was destroyed becomes one over that of now.
    stored: the parameters of the call, on the mesh of now.

    Collective. Raises `PlanError` where there is no group, or one of another number of ranks.
    """
    if place.world is dist.group.WORLD:
        return
    mesh = stored[0].device_mesh if stored else None
    fresh, _ = resolve(replace(options, mesh=mesh), device)
    if (fresh.axis.name, fresh.axis.size) != (place.axis.name, place.axis.size):
        raise PlanError(
            f"the model was compiled on {place.axis.size} ranks, the process group has changed: "
            "torch._dynamo.reset(), and compile it again"
        )
    for f in fields(Place):
        object.__setattr__(place, f.name, getattr(fresh, f.name))
    PLACES[place.axis.name] = place


def _place(name: str, axes: Axes) -> Place:
    group = axes.tsp.get_group()
    ranks = dist.get_process_group_ranks(group)
    axis, timeout = Axis(name, len(ranks), dist.get_rank(group)), timeout_of(group)
    groups: dict[str, Any] = {
        "outputs": group,
        "activations": group,
        "weights": dist.new_group(ranks, timeout, use_local_synchronization=True),
        "checks": dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True),
    }
    if axes.replicas is None:
        return Place(axis, groups, None, axes.tsp, dist.group.WORLD)
    other = axes.replicas.get_group()
    all_of_them = dist.get_process_group_ranks(other)
    groups["replicas"] = other
    groups["replica checks"] = dist.new_group(
        all_of_them, timeout_of(other), "gloo", use_local_synchronization=True
    )
    replicas = Axis("replicas", axes.replicas.size(), dist.get_rank(other))
    return Place(axis, groups, replicas, axes.tsp, dist.group.WORLD)


def _axes(mesh: DeviceMesh, axis: str | None) -> Axes:
    names = mesh.mesh_dim_names or ()
    if axis is not None and axis not in names:
        raise PlanError(
            f"the mesh has no axis {axis!r}; its axes are {', '.join(names) or 'unnamed'}"
        )
    if mesh.ndim == 1:
        return Axes(mesh, None, mesh)
    if axis is None and id(mesh) in _AXES:
        return _AXES[id(mesh)]
    if mesh.ndim > 2:
        raise PlanError(
            f"the mesh is {tuple(mesh.shape)}: give two axes, one to fold on and one of replicas"
        )
    if axis is None and "tsp" not in names:
        listed = ", ".join(names)
        raise PlanError(f"name the axis to fold on: options={{'axis': ...}}, one of {listed}")
    chosen = axis or "tsp"
    key = id(mesh), chosen
    if key not in _AXES:
        _AXES[key] = axes = _pair(mesh, chosen)
        _AXES[id(axes.storage)] = axes
        _KEPT.append(mesh)
    return _AXES[key]


def _pair(mesh: DeviceMesh, chosen: str) -> Axes:
    (other,) = [n for n in mesh.mesh_dim_names or () if n != chosen]
    tsp, replicas = mesh[chosen], mesh[other]
    if replicas.size() == 1:
        return Axes(tsp, None, tsp)
    if mesh.mesh_dim_names == (chosen, other):
        return Axes(tsp, replicas, mesh)
    groups = [tsp.get_group(), replicas.get_group()]
    storage = DeviceMesh.from_group(
        groups, mesh.device_type, mesh.mesh.T.contiguous(), mesh_dim_names=(chosen, other)
    )
    return Axes(tsp, replicas, storage)
