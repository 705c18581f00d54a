"""Checkpoints of torch.distributed.checkpoint with the optimizer's state: saved on 4 ranks,
resumed on 3, on one, and in a plain process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from tests.support.models import call, loss_of, make, tokens_of, whole
from tspc.base.options import parse
from tspc.runtime.mesh import resolve
from tspc.runtime.params.convert import convert

# TSP ranks and replicas that hold parts, by the ranks of a world
SHARES = {4: (2, 2), 2: (1, 2)}
MODELS = {"llama_like": (6, 3), "gpt2_like": (4, 4), "hf_qwen3": (4, 2)}
EAGER = {"compiler": "eager"}
Found = dict[str, tuple[list[float], dict[str, torch.Tensor]]]


def _steps(
    name: str, model: nn.Module, fn: Any, optimizer: torch.optim.Optimizer, first: int
) -> list[float]:
    """The losses of three clipped steps."""
    losses = []
    for i in range(first, first + 3):
        loss = loss_of(fn(**call(name, tokens_of(9, seed=i), True)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _flat(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """The whole tensors of a state by path."""
    if isinstance(state, torch.Tensor):
        return {prefix: whole(state.detach()).clone()}
    items = state.items() if isinstance(state, dict) else ()
    return {k: v for n, x in items for k, v in _flat(x, f"{prefix}/{n}").items()}


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    both = get_state_dict(model, optimizer)
    return {"model": both[0], "optimizer": both[1]}


def _models(cut: bool) -> list[tuple[str, tuple[int, int]]]:
    return [(name, heads) for name, heads in MODELS.items() if not cut or name != "hf_qwen3"]


def _mesh(cut: bool) -> DeviceMesh:
    ranks = dist.get_world_size()
    if cut:
        return init_device_mesh("cpu", SHARES[ranks], mesh_dim_names=("tsp", "replicas"))
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("tsp",))


def saved(folder: str, cut: bool = False) -> Found:
    """Per model: the losses of the next three steps, and what was saved.

    cut: over replicas too, which all get the same batch here.
    """
    out = {}
    for name, heads in _models(cut):
        torch._dynamo.reset()
        m = make(name, *heads, layers=1)
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
        options = {**EAGER, "mesh": _mesh(cut), "replicas": "shard" if cut else "replicate"}
        fn = torch.compile(m, backend="tsp", options=options)
        _steps(name, m, fn, optimizer, 0)
        state = _state(m, optimizer)
        dcp.save(state, checkpoint_id=f"{folder}/{name}")
        flat = _flat(state)
        out[name] = (_steps(name, m, fn, optimizer, 3), flat)
    return out


def resumed(folder: str, cut: bool = False) -> Found:
    """The same, from the checkpoint, into other weights; on several ranks sharded before."""
    out = {}
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for name, heads in _models(cut):
        torch._dynamo.reset()
        m = make(name, *heads, layers=1, seed=7)
        fn: Any = m
        if ranks > 1:
            place, mesh = resolve(parse({"mesh": _mesh(cut)}), torch.device("cpu"))
            # cut along other dims than it was saved
            convert(m, mesh, place.axis.name, {}, cut)
            assert all(isinstance(p, DTensor) for p in m.parameters())
            fn = torch.compile(m, backend="tsp", options=EAGER)
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
        state = _state(m, optimizer)
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_state_dict(
            m,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        flat = _flat(_state(m, optimizer))
        out[name] = (_steps(name, m, fn, optimizer, 3), flat)
    return out


@pytest.mark.dist
def test_resumes_on_other_ranks(world: Any, tmp_path: Path) -> None:
    wanted = world(4).run(saved, folder=str(tmp_path))[0]
    found = {3: world(3).run(resumed, folder=str(tmp_path))[0], 0: resumed(str(tmp_path))}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found[1] = resumed(str(tmp_path))
    dist.destroy_process_group()
    _equal(wanted, found)


@pytest.mark.dist
@pytest.mark.wide
def test_resumes_on_other_parts(world: Any, tmp_path: Path) -> None:
    wanted = world(4).run(saved, folder=str(tmp_path), cut=True)[0]
    found = {2: world(2).run(resumed, folder=str(tmp_path), cut=True)[0]}
    found[0] = resumed(str(tmp_path), True)
    _equal(wanted, found)


def _equal(wanted: Found, found: dict[int, Found]) -> None:
    assert all(len(w[1]) > 20 for w in wanted.values())
    for ranks, models in found.items():
        for name, (losses, state) in models.items():
            expected, tensors = wanted[name]
            assert state.keys() == tensors.keys(), (ranks, name)
            assert all(torch.equal(state[k], x) for k, x in tensors.items()), (ranks, name)
            assert losses == pytest.approx(expected, rel=1e-5), (ranks, name)
