"""Whole states: saved from shards on rank 0, resumed on ranks and on one device, with one curve."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor

import tspc
from tests.support.models import make, tokens_of

pytestmark = pytest.mark.dist
EAGER = {"compiler": "eager"}


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="tsp", options=EAGER)


def steps(fn: Any, optimizer: Any, first: int, count: int = 3) -> list[float]:
    losses = []
    for i in range(first, first + count):
        ids = tokens_of(9, seed=i)
        loss = fn(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": rest}]
    return torch.optim.AdamW(groups, lr=1e-2)


def saved(folder: str) -> list[float]:
    """Rank 0 writes what it was given; -> the losses of the next steps."""
    m = make("gpt2_like", heads=2, layers=1)
    fn, optimizer = compiled(m), adamw(m)
    steps(fn, optimizer, 0)
    state, optimizer_state = tspc.full_state_dict(fn, optimizer)
    assert tspc.full_state_dict(m).keys() == state.keys()
    if dist.get_rank():
        assert (state, optimizer_state) == ({}, {})
    else:
        assert state.keys() == m.state_dict().keys()
        assert state["head.weight"] is state["tokens.weight"]
        torch.save({"model": state, "optimizer": optimizer_state}, f"{folder}/whole.pt")
    dist.barrier()
    return steps(fn, optimizer, 3)


def resumed(folder: str, before: bool) -> list[float]:
    """before: loaded before the first call of the compiled model, else after."""
    m = make("gpt2_like", heads=2, layers=1, seed=7)
    fn, optimizer = compiled(m), adamw(m)
    if not before:
        steps(fn, optimizer, 10, 1)
        assert all(isinstance(p, DTensor) for p in m.parameters())
    state: Any = {"model": None, "optimizer": None}
    if dist.get_rank() == 0:
        state = torch.load(f"{folder}/whole.pt")
        state["model"] = {f"_orig_mod.{k}": v for k, v in state["model"].items()}
    found = tspc.load_full_state_dict(m, state["model"], optimizer, state["optimizer"])
    assert not found.missing_keys and not found.unexpected_keys
    assert m.head.weight is m.tokens.weight
    return steps(fn, optimizer, 3)


def refused() -> None:
    """The same error on all ranks, and nothing hangs after it."""
    m = make("gpt2_like", heads=2, layers=1)
    steps(compiled(m), adamw(m), 0, 1)
    state = tspc.full_state_dict(m)
    state.pop("norm.weight", None)
    with pytest.raises(RuntimeError, match='Missing key.*"norm.weight"'):
        tspc.load_full_state_dict(m, state)
    assert tspc.load_full_state_dict(m, state, strict=False).missing_keys == ["norm.weight"]
    with pytest.raises(tspc.PlanError, match="takes a module.* was given dict"):
        tspc.full_state_dict({})  # type: ignore[arg-type]
    with pytest.raises(tspc.ShardedParameterError, match="one order"):
        tspc.full_state_dict(m) if dist.get_rank() else tspc.load_full_state_dict(m, state)


def test_resumes_from_a_whole_state(world: Any, tmp_path: Path) -> None:
    wanted = world(2).run(saved, folder=str(tmp_path))[0]
    one = make("gpt2_like", heads=2, layers=1)
    optimizer = adamw(one)
    steps(one, optimizer, 0)
    assert steps(one, optimizer, 3) == pytest.approx(wanted, rel=1e-9)
    plain = make("gpt2_like", heads=2, layers=1, seed=5)
    optimizer = adamw(plain)
    state = torch.load(tmp_path / "whole.pt")
    plain.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert steps(plain, optimizer, 3) == pytest.approx(wanted, rel=1e-9)
    for before in (True, False):
        for losses in world(2).run(resumed, folder=str(tmp_path), before=before):
            assert losses == pytest.approx(wanted, rel=1e-9)


def test_what_does_not_load_is_told_on_all_ranks(world: Any) -> None:
    world(2).run(refused)


def test_one_process_has_the_same_calls() -> None:
    m = make("gpt2_like", heads=2, layers=1)
    optimizer = adamw(m)
    steps(m, optimizer, 0)
    file = io.BytesIO()
    torch.save(tspc.full_state_dict(m, optimizer), file)
    wanted = steps(m, optimizer, 3)
    file.seek(0)
    state, optimizer_state = torch.load(file)
    tspc.load_full_state_dict(m, state, optimizer, optimizer_state)
    assert steps(m, optimizer, 3) == wanted
