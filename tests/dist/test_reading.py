"""Safetensors checkpoints read straight into shards: the values, the memory, what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as st
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh

import tspc
from tests.support.models import make
from tests.dist.test_whole import adamw, compiled, steps
from tspc.base.options import parse
from tspc.runtime.mesh import resolve
from tspc.runtime.params.convert import convert

LAYERS, ROWS, COLUMNS = 6, 1024, 2048
TENSOR = ROWS * COLUMNS * 4 / 2**20  # MiB


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(COLUMNS, ROWS) for _ in range(LAYERS))
        self.register_buffer("count", torch.zeros(()))


def _sharded(model: nn.Module, mesh: Any = None, cut: bool = False) -> nn.Module:
    place, mesh = resolve(parse({"mesh": mesh}), torch.device("cpu"))
    convert(model, mesh, place.axis.name, {}, cut)
    return model


def _status(key: str) -> float:
    """MiB of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def read(folder: str) -> float:
    """MiB at the peak above what the shards take."""
    with torch.device("meta"):
        model = Layers()
    _sharded(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tsp",)))
    with pytest.raises(tspc.PlanError, match=r"is on meta: model\.to_empty\(device"):
        tspc.load_safetensors(model, folder)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for x in model.state_dict().values():
            x.zero_()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    before = _status("VmRSS")
    tspc.load_safetensors(model, folder)
    peak = _status("VmHWM") - before
    whole = tspc.full_state_dict(model)
    if dist.get_rank() == 0:
        assert whole.keys() == model.state_dict().keys()
        for name, x in _values().items():
            assert torch.equal(whole[name], x), name
    return peak


def _values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    out = {"count": torch.tensor(5.0)}
    for i in range(LAYERS):
        out[f"layers.{i}.weight"] = torch.randn((ROWS, COLUMNS), generator=generator)
        out[f"layers.{i}.bias"] = torch.randn((ROWS,), generator=generator)
    return out


@pytest.mark.dist
def test_reads_slices_in_the_memory_of_one_tensor(world: Any, tmp_path: Path) -> None:
    st.save_file(_values(), tmp_path / "model.safetensors")
    for peak in world(2).run(read, folder=str(tmp_path)):
        assert 0 < peak < 1.75 * TENSOR  # the whole model is LAYERS of them


def tied_and_trained(folder: str) -> list[float]:
    """Into a model that trains already, from parts with an index and a tied tensor left out."""
    m = make("gpt2_like", heads=2, layers=1, seed=7)
    fn, optimizer = compiled(m), adamw(m)
    steps(fn, optimizer, 10, 1)
    found = tspc.load_safetensors(fn, folder)
    assert not found.missing_keys and not found.unexpected_keys
    optimizer = adamw(m)
    return steps(fn, optimizer, 0, 2)


@pytest.mark.dist
def test_reads_parts_and_ties(world: Any, tmp_path: Path) -> None:
    m = make("gpt2_like", heads=2, layers=1)
    state = {k: x for k, x in m.state_dict().items() if k != "head.weight"}
    _write_parts(state, tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"not of it")
    wanted = pytest.approx(steps(m, adamw(m), 0, 2), rel=1e-9)
    assert world(2).run(tied_and_trained, folder=str(tmp_path)) == [wanted, wanted]


def _write_parts(state: dict[str, torch.Tensor], folder: Path) -> None:
    names, parts = list(state), {}
    for i in range(2):
        part = {f"_orig_mod.{n}": state[n] for n in names[i::2]}
        st.save_file(part, folder / f"part-{i}.safetensors")
        parts |= dict.fromkeys(part, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    m = nn.Linear(4, 3)
    before = m.weight.detach().clone()
    st.save_file({"weight": torch.ones(3, 4), "more": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(tspc.PlanError, match="bias is not in the files; more is not in the model"):
        tspc.load_safetensors(m, tmp_path)
    assert torch.equal(m.weight, before)
    found = tspc.load_safetensors(m, tmp_path / "a.safetensors", strict=False)
    assert found == (["bias"], ["more"]) and torch.equal(m.weight, torch.ones(3, 4))
    st.save_file({"weight": torch.ones(4, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(tspc.PlanError, match=r"weight is \[3, 4\], the file has \[4, 3\]"):
        tspc.load_safetensors(m, tmp_path, strict=False)
    with pytest.raises(tspc.PlanError, match="no file or folder"):
        tspc.load_safetensors(m, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(tspc.PlanError, match="has no .safetensors file"):
        tspc.load_safetensors(m, tmp_path / "empty")


def over_replicas(folder: str) -> bool:
    """Cut over the replicas too."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tsp", "replicas"))
    m = _sharded(make("gpt2_like", heads=2, layers=1, seed=7), mesh, cut=True)
    tspc.load_safetensors(m, folder)
    given = tspc.full_state_dict(m)
    one = make("gpt2_like", heads=2, layers=1).state_dict()
    again = _sharded(make("gpt2_like", heads=2, layers=1, seed=8), mesh, cut=True)
    tspc.load_full_state_dict(again, given)
    both = given, tspc.full_state_dict(again)
    return dist.get_rank() > 0 or all(torch.equal(s[k], x) for s in both for k, x in one.items())


@pytest.mark.dist
@pytest.mark.wide
def test_reads_parts_over_replicas(world: Any, tmp_path: Path) -> None:
    m = make("gpt2_like", heads=2, layers=1)
    st.save_model(m, tmp_path / "model.safetensors")
    assert all(world(4).run(over_replicas, folder=str(tmp_path)))
