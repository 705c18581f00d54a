"""What a training script does to a model between its calls, done to a sharded one and to one on one
device: they stay equal."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tspc
from tests.support.models import make, tokens_of, whole
from tests.parity.test_buffers import Tracking
from tspc.backend.simulated import relative_errors

pytestmark = [pytest.mark.dist, pytest.mark.sampled(3)]
EAGER = {"compiler": "eager"}
TOKENS = tokens_of(9)


class Twins:
    """The same model compiled over the ranks, and on one device; `found` is the worst error."""

    def __init__(self, mine: nn.Module, one: nn.Module, options: dict[str, Any] = EAGER):
        self.mine, self.one = mine, one
        self.fn: Any = torch.compile(mine, backend="tsp", options=options)
        self.found: dict[str, float] = {}

    def both(self, do: Callable[[nn.Module], Any]) -> list[Any]:
        return [do(self.mine), do(self.one)]

    def check(self, name: str, train: bool = True) -> None:
        """Losses, and gradients where a parameter wants one."""
        ends = []
        for m, fn in ((self.mine, self.fn), (self.one, self.one)):
            m.zero_grad()
            loss = fn(TOKENS, TOKENS)
            if train:
                loss.backward()
            grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
            values = {**grads, "": loss, **dict(m.named_buffers())}
            ends.append({n: whole(x.detach()) for n, x in values.items()})
        assert ends[0].keys() == ends[1].keys(), name
        self.found[name] = max(relative_errors(*ends).values())


def _weights(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A whole state of other weights; tied ones stay equal."""
    torch.manual_seed(seed)
    state = {n: torch.randn(x.shape, dtype=x.dtype) for n, x in model.state_dict().items()}
    return {**state, "head.weight": state["tokens.weight"]}


def modes() -> dict[str, float]:
    t = Twins(*(make("gpt2_like", layers=1) for _ in range(2)))
    with torch.inference_mode():
        t.check("inference_mode first", train=False)
    with torch.no_grad():
        t.check("no_grad", train=False)
    t.check("train")
    t.both(lambda m: m.eval())
    t.check("eval")
    t.both(lambda m: m.train())
    t.check("train again")
    t.both(lambda m: m.requires_grad_(False))
    t.check("frozen", train=False)
    t.both(lambda m: m.blocks.requires_grad_(True))
    t.check("frozen in part")
    return t.found


def parts() -> dict[str, Any]:
    """Options: two replicas, which get the same batch here, and parameters cut over them too."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "tsp"))
    return {**EAGER, "mesh": mesh, "replicas": "shard"}


def copies(cut: bool = False) -> dict[str, float]:
    """deepcopy, averages, an eager call, saving and loading."""
    options = parts() if cut else EAGER
    t = Twins(*(make("gpt2_like", layers=1) for _ in range(2)), options)
    t.check("first")
    assert [n for n, _ in t.mine.named_parameters()] == [n for n, _ in t.one.named_parameters()]
    assert t.mine.state_dict().keys() == t.one.state_dict().keys()
    assert all(isinstance(p, DTensor) for p in t.mine.parameters())
    t.found["eager"] = float((t.mine(TOKENS, TOKENS) - t.one(TOKENS, TOKENS)).detach().abs())
    ema = Twins(*t.both(copy.deepcopy), options)
    averages = t.both(lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
    average = Twins(*averages, options)
    assert ema.mine.head.weight is ema.mine.tokens.weight
    assert ema.mine.head.weight is not t.mine.head.weight
    t.both(lambda m: m.load_state_dict(_weights(t.one, 1)))
    t.check("whole state")
    with torch.no_grad():
        for a, b in ((ema.mine, t.mine), (ema.one, t.one)):
            for p, q in zip(a.parameters(), b.parameters()):
                p.lerp_(q, 0.1)
    average.mine.update_parameters(t.mine), average.one.update_parameters(t.one)
    ema.check("ema"), average.check("averaged")
    t.mine.load_state_dict(ema.mine.state_dict()), t.one.load_state_dict(ema.one.state_dict())
    t.check("state of shards")
    gathered, plain = io.BytesIO(), make("gpt2_like", layers=1, seed=5)
    torch.save({n: whole(x) for n, x in t.mine.state_dict().items()}, gathered)
    gathered.seek(0)
    plain.load_state_dict(torch.load(gathered))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), t.one.parameters()))
    full = StateDictOptions(full_state_dict=True)
    state = {n: x * 0.5 for n, x in get_model_state_dict(t.fn, options=full).items()}
    set_model_state_dict(t.fn, state, options=full)
    t.one.load_state_dict({n: x * 0.5 for n, x in t.one.state_dict().items()})
    t.check("full state")
    for x in (t.mine, t.mine.state_dict(), next(t.mine.parameters())):
        with pytest.raises(tspc.ShardedParameterError, match="Call tspc.full_state_dict"):
            torch.save(x, io.BytesIO())
    return t.found | ema.found | average.found


def changed(cut: bool = False) -> dict[str, float]:
    """Parameters replaced, assigned, moved to other types; optimizers, schedules, clipping."""
    t = Twins(*(make("gpt2_like", layers=1) for _ in range(2)), parts() if cut else EAGER)
    t.check("first")
    w = _weights(t.one, 2)["blocks.0.wide.weight"]
    t.both(lambda m: setattr(m.blocks[0].wide, "weight", nn.Parameter(w.clone())))
    t.check("replaced")
    assert isinstance(t.mine.blocks[0].wide.weight, DTensor)
    t.both(lambda m: setattr(m.blocks[0].wide.weight, "data", w * 2))
    t.check("data, whole")
    for m in (t.mine, t.one):
        m.blocks[0].wide.weight.data = m.blocks[0].wide.weight.data * 0.5
    t.check("data, shards")
    with pytest.raises(tspc.ShardedParameterError, match=r"\[128, 32\].* set to \[3, 32\]"):
        t.mine.blocks[0].wide.weight.data = w[:3]
    t.both(lambda m: setattr(m.blocks[0], "wide", copy.deepcopy(plain_linear())))
    t.check("module replaced")
    ends = []
    for m, fn in ((t.mine, t.fn), (t.one, t.one)):
        first = torch.optim.AdamW([m.tokens.weight], lr=1e-2)
        rest = [p for p in m.parameters() if p is not m.tokens.weight]
        second = torch.optim.SGD(rest, lr=1e-2, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(first, 3)
        for _ in range(3):
            fn(TOKENS, TOKENS).backward()
            norm = torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            torch.nn.utils.clip_grad_value_(m.parameters(), 0.1)
            first.step(), second.step(), schedule.step()
            m.zero_grad(set_to_none=False)
        named = {n: whole(p.detach()) for n, p in m.named_parameters()}
        ends.append({**named, "norm": whole(norm)})
    t.found["optimizers"] = max(relative_errors(*ends).values())
    t.both(lambda m: m.to("cpu").float())
    t.check("float32")
    t.both(lambda m: m.double())
    t.check("double")
    assert t.mine.head.weight is t.mine.tokens.weight
    return t.found


def plain_linear() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(32, 128).double()


def buffers() -> dict[str, float]:
    """Buffers that the forward writes."""
    mine, one = Tracking().double(), Tracking().double()
    one.load_state_dict(mine.state_dict())
    t = Twins(mine, one)
    for i in range(3):
        t.check(f"call {i}")
    return t.found


LIVES = [(modes, 2), (copies, 2), (changed, 2), (buffers, 2), (copies, 4), (changed, 4)]


@pytest.mark.parametrize("life, ranks", LIVES)
def test_stays_equal_to_one_device(
    world: Any, life: Callable[..., dict[str, float]], ranks: int
) -> None:
    for found in world(ranks).run(life, **({"cut": True} if ranks == 4 else {})):
        bad = {n: e for n, e in found.items() if not e < (1e-5 if n == "float32" else 1e-9)}
        assert not bad and len(found) > 2
