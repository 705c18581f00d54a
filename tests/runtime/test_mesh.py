"""The axis of a run: which mesh dim, its groups, replicas; meshes that do not fit are told."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.support.group import alone
from tspc.base.errors import PlanError
from tspc.base.options import Options
from tspc.runtime import mesh as module
from tspc.runtime.comm.place import PLACES
from tspc.runtime.comm.requests import Axis
from tspc.runtime.mesh import Axes, renew, resolve

CPU = torch.device("cpu")


@pytest.fixture
def group() -> Iterator[DeviceMesh]:
    with alone() as m:
        yield m


def test_without_a_group_it_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    place, mesh = resolve(Options(), CPU)
    assert place.axis == Axis("tsp", 1, 0) and mesh is None
    with pytest.raises(PlanError, match="a mesh was given but no process group"):
        resolve(Options(mesh=SimpleNamespace()), CPU)  # type: ignore[arg-type]


def test_the_world_is_one_axis(group: DeviceMesh) -> None:
    place, mesh = resolve(Options(), CPU)
    assert mesh is not None and mesh.mesh_dim_names == ("tsp",)
    assert place.axis == Axis("tsp_0", 1, 0) and place.replicas is None and place.mesh is mesh
    assert set(place.groups) == {"outputs", "activations", "weights", "checks"}
    assert place.groups["weights"] is not place.groups["activations"]
    assert resolve(Options(), CPU)[0] is place is PLACES["tsp_0"]


def test_a_mesh_of_two_axes(group: DeviceMesh) -> None:
    both = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tsp"))
    place, stored = resolve(Options(mesh=both), CPU)
    assert place.replicas is None and stored is not None and stored.mesh_dim_names == ("tsp",)
    named, _ = resolve(Options(mesh=both, axis="dp"), CPU)
    assert named.axis.name == "dp_0"


def test_axes_of_replicas_are_stored_on_both(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sub:
        def __init__(self, name: str) -> None:
            self.name = name

        def size(self) -> int:
            return 2

        def get_group(self) -> str:
            return f"group of {self.name}"

    class Two(dict[str, Sub]):
        mesh_dim_names, ndim, device_type = ("dp", "tsp"), 2, "cpu"
        mesh, shape = torch.arange(4).view(2, 2), (2, 2)

    made: list[Any] = []
    monkeypatch.setattr(
        module.DeviceMesh, "from_group", lambda groups, *a, **k: made.append((groups, a, k)) or made
    )
    mesh: Any = Two(dp=Sub("dp"), tsp=Sub("tsp"))
    axes = module._pair(mesh, "tsp")
    assert axes.tsp is mesh["tsp"] and axes.replicas is mesh["dp"]
    ((groups, _, names),) = made
    assert groups == ["group of tsp", "group of dp"]
    assert names == {"mesh_dim_names": ("tsp", "dp")}
    Two.mesh_dim_names = ("tsp", "dp")
    assert module._pair(mesh, "tsp") == Axes(mesh["tsp"], mesh["dp"], mesh)


def test_meshes_that_do_not_fit(group: DeviceMesh) -> None:
    with pytest.raises(PlanError, match="the mesh has no axis 'x'; its axes are tsp"):
        resolve(Options(mesh=group, axis="x"), CPU)
    three = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("a", "b", "c"))
    with pytest.raises(PlanError, match=r"the mesh is \(1, 1, 1\): give two axes"):
        resolve(Options(mesh=three), CPU)
    unnamed = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    with pytest.raises(PlanError, match="name the axis to fold on"):
        resolve(Options(mesh=unnamed), CPU)
    with pytest.raises(
        PlanError, match=r"the model is on meta, where nothing runs: model.to_empty"
    ):
        resolve(Options(), torch.device("meta"))
    with pytest.raises(PlanError, match="the model is on meta, the mesh on cpu"):
        resolve(Options(mesh=group), torch.device("meta"))
    assert resolve(Options(), torch.device("meta"), planned=True)[1] is not None


def test_a_place_over_a_group_that_is_gone_is_renewed() -> None:
    with alone():
        place, _ = resolve(Options(), CPU)
        before = place.groups["checks"]
        renew(place, Options(), [], CPU)
        assert place.groups["checks"] is before
    with alone() as other:
        renew(place, Options(), [], CPU)
        assert place.groups["checks"] is not before and place.world is dist.group.WORLD
        assert PLACES[place.axis.name] is place and other.ndim == 1
    with alone():
        object.__setattr__(place, "axis", Axis(place.axis.name, 3, 0))
        with pytest.raises(PlanError, match="the model was compiled on 3 ranks"):
            renew(place, Options(), [], CPU)
