"""What other code writes of a sharded model: whole tensors from rank 0, or an error that says which
call to make."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as st
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import tspc
from tests.support.models import make, tokens_of
from tests.dist.test_whole import adamw, compiled, steps
from tspc.runtime.params import whole

pytestmark = pytest.mark.dist
TIED = {"head.weight", "tokens.weight"}


def _trained(name: str = "gpt2_like", **kwargs: Any) -> tuple[Any, Any, Any]:
    m = make(name, heads=2, kv_heads=2, layers=1, **kwargs)
    fn, optimizer = compiled(m), adamw(m)
    ids = tokens_of(9)
    for _ in range(2):
        out = fn(ids, labels=ids) if name.startswith("hf") else fn(ids, ids)
        getattr(out, "loss", out).backward()
        optimizer.step()
        optimizer.zero_grad()
    return m, fn, optimizer


def _send(pipe: Any) -> None:
    pipe.send(type(pipe.recv()).__name__)


def pickled() -> None:
    """Refused, on all ranks, whatever is asked; copies and other processes are as before."""
    m, fn, optimizer = _trained()
    w = m.tokens.weight
    w.grad = torch.ones_like(w)
    for x in (fn, m, m.state_dict(), optimizer.state_dict(), w, w.grad, w.detach()):
        with pytest.raises(tspc.ShardedParameterError, match=r"tspc\.full_state_dict\(model\)"):
            torch.save(x, io.BytesIO())
    with pytest.raises(tspc.ShardedParameterError, match="rank's part .*whole"):
        pickle.dumps(w)
    small = m.norm.weight  # each rank has all of it
    again = pickle.loads(pickle.dumps(small))
    assert type(again) is torch.nn.Parameter and torch.equal(again, small.full_tensor())
    assert type(pickle.loads(pickle.dumps(small.detach()))) is torch.Tensor
    for x in (copy.copy(w), copy.deepcopy(optimizer.state_dict())["state"][0]["exp_avg"]):
        assert isinstance(x, DTensor) and x.shape == w.shape
    mine, theirs = multiprocessing.get_context("fork").Pipe()
    mine.send(w.detach())  # a process may send a shard, as asynchronous checkpoints do
    assert isinstance(theirs.recv(), DTensor)


def test_a_shard_is_not_pickled(world: Any) -> None:
    world(2).run(pickled)


def by_safetensors(folder: str) -> list[float]:
    m, fn, optimizer = _trained()
    state = m.state_dict()
    st.save_model(m, f"{folder}/model.safetensors")
    st.save_file({k: v for k, v in state.items() if k != "head.weight"}, f"{folder}/file")
    data = st.save({"w": m.tokens.weight.detach()})
    if dist.get_rank() == 0:
        assert torch.equal(st.load(data)["w"], st.load_file(f"{folder}/file")["tokens.weight"])
    else:
        assert data == b""
    error = RuntimeError if dist.get_rank() == 0 else tspc.RankFailureError
    with pytest.raises(error, match="share memory"):  # tied: refused by the library
        st.save_file(state, f"{folder}/tied")
    with pytest.raises(Exception, match="could not write|No such file"):
        st.save_model(m, f"{folder}/nowhere/file")
    given = tspc.full_state_dict(m)
    if dist.get_rank() == 0:
        found = st.load_file(f"{folder}/model.safetensors")
        assert TIED - found.keys() and found.keys() | TIED == given.keys()
        assert all(torch.equal(x, given[k]) for k, x in found.items())
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(3)
    assert st.load_model(m, f"{folder}/model.safetensors") == (set(), [])
    assert all(torch.equal(v, given[k]) for k, v in tspc.full_state_dict(m).items())
    return steps(fn, optimizer, 3, 1)


def test_safetensors_writes_from_rank_0(world: Any, tmp_path: Path) -> None:
    losses = world(2).run(by_safetensors, folder=str(tmp_path))
    m, _, _ = _plain()
    st.load_model(m, tmp_path / "model.safetensors")
    ids = tokens_of(9, seed=3)
    assert losses[0] == losses[1] == [pytest.approx(float(m(ids, ids)), rel=1e-9)]


def _plain() -> tuple[Any, Any, Any]:
    m = make("gpt2_like", heads=2, layers=1, seed=4)
    return m, m, adamw(m)


def by_save_pretrained(folder: str) -> None:
    m, fn, optimizer = _trained("hf_llama")
    m.save_pretrained(f"{folder}/one")
    fn.save_pretrained(f"{folder}/many", max_shard_size="40KB")
    m.save_pretrained(f"{folder}/main", is_main_process=dist.get_rank() == 0)
    m.save_pretrained(f"{folder}/given", state_dict=m.state_dict())
    state = tspc.full_state_dict(m)
    if dist.get_rank() == 0:
        torch.save(state, f"{folder}/whole.pt")
    m.save_pretrained(f"{folder}/whole", state_dict=state, is_main_process=dist.get_rank() == 0)


def test_save_pretrained_writes_from_rank_0(world: Any, tmp_path: Path) -> None:
    world(2).run(by_save_pretrained, folder=str(tmp_path))
    state = torch.load(tmp_path / "whole.pt")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    wanted = make("hf_llama", heads=2, kv_heads=2, layers=1, seed=4)
    wanted.load_state_dict(state)
    ids = tokens_of(9)
    for name in ("one", "many", "main", "given", "whole"):
        found = type(wanted).from_pretrained(tmp_path / name, dtype=torch.float64)
        assert all(torch.equal(x, state[n]) for n, x in found.state_dict().items()), name
        # a file that is mapped begins anywhere, and products of what is not aligned round otherwise
        assert torch.equal(copy.deepcopy(found)(ids).logits, wanted(ids).logits), name


def late() -> str:
    """Rank 1 does not come."""
    m, _, _ = _trained()
    if dist.get_rank() == 1:
        whole._MEETINGS["tspc/state/0_1"] += 1
        return ""
    plain, whole.timeout_of = whole.timeout_of, lambda group: timedelta(seconds=1)
    try:
        tspc.full_state_dict(m)
    except tspc.RankFailureError as e:
        return str(e)
    finally:
        whole.timeout_of = plain
    return "nothing"


def test_a_rank_that_does_not_come_is_told(world: Any) -> None:
    told = world(2).run(late)[0]
    assert "rank 0 waited in tspc.full_state_dict" in told and "missing: rank 1" in told
    assert "to be called on all of them" in told
