"""A model made on meta: planned, applied and initialised over gloo equals the one that one device
constructs under the seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import tspc
from tests.support.models import MODELS, call, loss_of, tokens_of, whole
from tspc.backend.simulated import relative_errors
from tspc.runtime.comm.place import Place
from tspc.runtime.comm.requests import Axis
from tspc.runtime.params.initialise import Wholes

pytestmark = pytest.mark.sampled(6)

EAGER = {"compiler": "eager"}


class Plain(nn.Module):
    """Modules of torch alone, a buffer that is not saved among them."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm = nn.Linear(8, 37), nn.BatchNorm1d(37)
        self.narrow = nn.Linear(37, 8)
        self.norm.register_buffer("running_var", torch.ones(37), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.relu(self.wide(x))).square().mean()


class Custom(Plain):
    def __init__(self) -> None:
        super().__init__()
        spread(self)


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """An initialiser with several writes to one weight, views and a read of another one."""
    nn.init.trunc_normal_(model.wide.weight, std=0.3)
    nn.init.orthogonal_(model.narrow.weight)
    model.wide.weight[3].fill_(0.5)
    model.narrow.weight.mul_(model.wide.weight.mean())
    for b in (model.wide.bias, model.narrow.bias):
        b.zero_()
    model.norm.reset_parameters()


def llama() -> nn.Module:
    return MODELS["llama_like"](6, 3, 1)


def gpt2() -> nn.Module:
    return MODELS["gpt2_like"](4, 4, 1)


def qwen3() -> nn.Module:
    return MODELS["hf_qwen3"](4, 2, 1)


# constructor, model of `call`, keyword arguments of plan.init
CASES: list[tuple[Callable[[], nn.Module], str, dict[str, Any]]] = [
    (llama, "llama_like", {"build": llama}),
    (gpt2, "gpt2_like", {"build": gpt2}),
    (qwen3, "hf_qwen3", {}),
    (Plain, "", {}),
    (Custom, "", {"init_fn": spread}),
]


def prepared(build: Callable[[], nn.Module]) -> tuple[nn.Module, tspc.Plan, dict[str, Any]]:
    """A model without values, its shards on the CPU."""
    model = next((name for b, name, _ in CASES if b is build), "")
    inputs = call(model, tokens_of(9), True) if model else {"x": torch.ones(2, 9, 8).cumsum(1)}
    with torch.device("meta"):
        m = build()
    plan = tspc.plan(m, (), inputs, ranks=dist.get_world_size(), options=EAGER)
    plan.apply(m, init_device_mesh("cpu", (dist.get_world_size(),)))
    assert all(isinstance(p, DTensor) and p.is_meta for p in m.parameters())
    return m.to_empty(device="cpu"), plan, inputs


def initialised(case: int) -> tuple[list[str], float, bool]:
    """What differs by a bit, the error of the loss and gradients, tied or not as it should be."""
    build, _, how = CASES[case]
    m, plan, inputs = prepared(build)
    torch.manual_seed(3 + dist.get_rank())
    plan.init(m, **how)
    after = torch.rand(3)
    torch.manual_seed(3)
    one = build()
    if "init_fn" in how:
        torch.manual_seed(3)
        spread(one)
    if m.__class__.__name__ != "GPT2Like":
        assert torch.equal(after, torch.rand(3))
    mine = dict(m.named_parameters()) | dict(m.named_buffers())
    wanted = dict(one.named_parameters()) | dict(one.named_buffers())
    assert mine.keys() == wanted.keys()
    wrong = [n for n, x in wanted.items() if not torch.equal(whole(mine[n].detach()), x)]
    compiled = torch.compile(m, backend="tsp", options={"plan": plan})
    losses = [loss_of(f(**inputs)) for f in (one, compiled)]
    for l in losses:
        l.backward()
    grads = [
        {n: whole(p.grad) for n, p in x.named_parameters() if p.grad is not None} for x in (one, m)
    ]
    errors = relative_errors(
        {**grads[1], "loss": losses[1].detach()}, {**grads[0], "loss": losses[0].detach()}
    )
    tied = "gpt2" not in build.__name__ or m.head.weight is m.tokens.weight
    return wrong, max(errors.values()), tied


@pytest.mark.dist
@pytest.mark.parametrize("case", range(len(CASES)))
def test_equals_one_device(world: Any, case: int) -> None:
    for wrong, error, tied in world(2).run(initialised, case=case):
        assert not wrong and error < 1e-5 and tied


def loaded() -> tuple[list[str], float]:
    """A checkpoint of whole tensors in the place of an initialisation."""
    m, plan, inputs = prepared(llama)
    torch.manual_seed(4)
    one = llama()
    m.load_state_dict(one.state_dict())
    wanted = one.state_dict()
    wrong = [n for n, x in m.state_dict().items() if not torch.equal(whole(x), wanted[n])]
    compiled = torch.compile(m, backend="tsp", options={"plan": plan})
    return wrong, float((compiled(**inputs) - one(**inputs)).abs())


@pytest.mark.dist
def test_a_checkpoint_instead(world: Any) -> None:
    for wrong, error in world(2).run(loaded):
        assert not wrong and error < 1e-5


def refused() -> list[str]:
    """What cannot be initialised."""
    told = []
    for build, how in (
        (llama, {}),
        (gpt2, {}),
        (llama, {"build": lambda: MODELS["llama_like"](4, 2, 1)}),
        (llama, {"build": llama, "init_fn": spread}),
    ):
        m, plan, _ = prepared(build)
        try:
            plan.init(m, **how)
        except tspc.PlanError as e:
            told.append(str(e))
        assert all(isinstance(p, DTensor) for p in m.parameters())
    return told


@pytest.mark.dist
def test_what_cannot_be_initialised_is_told(world: Any) -> None:
    for told in world(2).run(refused):
        assert len(told) == 4
        assert "nothing initialises blocks.0.norm1.weight" in told[0] and "(RMSNorm)" in told[0]
        assert "head and tokens share a parameter" in told[1] and "build=" in told[1]
        assert "embedding.weight is (187, 48), what was built has (187, 32)" in told[2]
        assert "not both" in told[3]


def test_one_rank_needs_no_group() -> None:
    x = torch.rand(2, 9, 8)
    with torch.device("meta"):
        m = Plain()
    plan = tspc.plan(m, (x,), ranks=1)
    plan.apply(m)
    with pytest.raises(tspc.PlanError, match=r"wide.weight is on meta: model.to_empty"):
        plan.init(m)
    torch.manual_seed(0)
    plan.init(m.to_empty(device="cpu"), Plain)
    torch.manual_seed(0)
    one = Plain()
    assert all(torch.equal(a, b) for a, b in zip(m.parameters(), one.parameters()))
    assert torch.equal(m.norm.running_var, one.norm.running_var)


def test_a_plan_that_is_not_applied() -> None:
    m = Plain()
    with pytest.raises(tspc.PlanError, match=r"plan.apply\(model, mesh\) first"):
        tspc.plan(m, (torch.rand(2, 9, 8),), ranks=2).init(copy.deepcopy(m))


def test_one_whole_parameter_is_in_memory() -> None:
    wholes = Wholes(Place(Axis("none", 2, 0)))
    tensors = [torch.empty(100) for _ in range(5)]
    for t in tensors:
        wholes.keep(t)
        wholes.drop(t)
    with wholes:
        for t in tensors:
            t.normal_()
            t[3:5].fill_(1)
            assert [x.untyped_storage().nbytes() for x in tensors if x is not t] == [0] * 4
    assert [k.chunk is not None for k in wholes.kept.values()] == [True] * 4 + [False]
