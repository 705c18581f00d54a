"""A second mesh axis of replicas, with whole chunks or with parts of them: each replica has its own
batch, gradients are the mean over them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import tspc
from examples.llama_like import LlamaLike
from examples.measure import state_bytes
from tests.support.models import call, loss_of, make, tokens_of, whole
from tspc.backend.simulated import relative_errors
from tspc.runtime.comm.drivers import record

pytestmark = [pytest.mark.dist, pytest.mark.sampled(5)]
STEPS, LENGTH, BATCH = 5, 11, 2
EAGER = {"compiler": "eager"}


def tokens(step: int, micro: int, replica: int) -> torch.Tensor:
    return tokens_of(LENGTH, BATCH, seed=100 * step + 10 * micro + replica)


def mesh_of(shape: tuple[int, int], names: tuple[str, str]) -> tuple[Any, int, int]:
    """(the mesh, how many replicas, which one this is)."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return mesh, mesh["replicas"].size(), mesh["replicas"].get_local_rank()


def between(sent: list[Any]) -> int:
    return sum(s.link == "replicas" for s in sent)


def train(
    shape: tuple[int, int],
    names: tuple[str, str],
    adam: bool,
    accumulate: int,
    quiet: bool,
    model: str,
    options: dict[str, Any],
) -> float:
    """Worst relative error of the updates of 5 clipped steps in float64 against one device on the
    concatenated batch."""
    mesh, replicas, mine = mesh_of(shape, names)
    heads = (6, 3) if model == "llama_like" else (4, 4)
    ends = []
    for tsp in (False, True):
        torch.manual_seed(dist.get_rank() if tsp else 0)  # all take the first rank's weights
        m = make(model, *heads, layers=1)
        if tsp and dist.get_rank():
            with torch.no_grad():
                for p in m.parameters():
                    p.add_(1.0)
        start = {n: p.detach().clone() for n, p in make(model, *heads, layers=1).named_parameters()}
        given = {"mesh": mesh, **options}
        fn = torch.compile(m, backend="tsp", options=given, dynamic=True) if tsp else m
        kind = torch.optim.AdamW if adam else torch.optim.SGD
        optimizer = kind(m.parameters(), lr=1e-2)
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=step < 3)
            for micro in range(accumulate):
                every = [tokens(step, micro, r) for r in range(replicas)]
                batch = every[mine] if tsp else torch.cat(every)
                last = micro == accumulate - 1
                held = tspc.no_sync(fn) if quiet and not last else contextlib.nullcontext()
                with held:
                    loss = loss_of(fn(**call(model, batch, True))) / accumulate
                    with record() as sent:
                        loss.backward()
                wanted = tsp and replicas > 1 and (last or not quiet)
                assert (between(sent) > 0) is wanted
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            optimizer.step()
        ends.append({n: whole(p.detach()) - start[n] for n, p in m.named_parameters()})
        if tsp:
            assert all(isinstance(p, DTensor) for p in m.parameters())
            assert "fold" in tspc.explain(fn)
    return max(relative_errors(ends[1], ends[0]).values())


ZERO = {"replicas": "shard"}
FIRST, LAST = ("replicas", "tsp"), ("tsp", "replicas")


CASES = [
    ((2, 1), FIRST, False, 3, True, "llama_like", EAGER),
    ((2, 1), LAST, True, 1, False, "llama_like", EAGER | ZERO),
    ((2, 1), FIRST, True, 3, True, "gpt2_like", EAGER | ZERO),
    ((2, 2), FIRST, False, 1, False, "llama_like", {}),
    pytest.param(((2, 2), LAST, True, 3, True, "gpt2_like", EAGER), marks=pytest.mark.wide),
    ((2, 2), FIRST, True, 3, True, "llama_like", EAGER | ZERO),
    ((2, 2), LAST, False, 3, False, "gpt2_like", EAGER | ZERO),
]


@pytest.mark.parametrize("case", CASES)
def test_equals_one_device_on_all_batches(world: Any, case: tuple[Any, ...]) -> None:
    names = ("shape", "names", "adam", "accumulate", "quiet", "model", "options")
    found = world(case[0][0] * case[0][1]).run(train, **dict(zip(names, case)))
    assert max(found) <= 1e-9


def floats(model: str, options: dict[str, Any]) -> tuple[float, float]:
    """In float32: worst relative error of the first gradients, and of the losses of 5 steps."""
    mesh, replicas, mine = mesh_of((2, 2), FIRST)
    ends = []
    for tsp in (False, True):
        m = make(model, layers=1).float()
        given = {"mesh": mesh, **EAGER, **options}
        fn = torch.compile(m, backend="tsp", options=given, dynamic=True) if tsp else m
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
        losses, grads = [], {}
        for step in range(STEPS):
            every = [tokens(step, 0, r) for r in range(replicas)]
            loss = loss_of(fn(**call(model, every[mine] if tsp else torch.cat(every), True)))
            loss.backward()
            grads = grads or {n: whole(p.grad).clone() for n, p in m.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().clone()
            if tsp:  # the mean over the replicas
                dist.all_reduce(total, group=mesh["replicas"].get_group())
                total /= replicas
            losses.append(total)
        ends.append((grads, torch.stack(losses)))
    (wanted, first), (found, second) = ends
    worst = max(relative_errors(found, wanted).values())
    return worst, float(((second - first) / first).abs().max())


@pytest.mark.parametrize(
    "model, options", [("hf_llama", ZERO), pytest.param("hf_qwen3", {}, marks=pytest.mark.wide)]
)
def test_float32(world: Any, model: str, options: dict[str, Any]) -> None:
    for grads, losses in world(4).run(floats, model=model, options=options):
        assert grads <= 1e-5 and losses <= 1e-4


def applied(options: dict[str, Any]) -> tuple[float, list[str]]:
    """A model made on meta, then `plan.apply` and `plan.init` on the mesh, compiled without naming
    it again: the error of gradients, and what differs from one device's start."""
    mesh, _, mine = mesh_of((2, 2), FIRST)

    def build() -> nn.Module:
        return LlamaLike(187, 32, 1, 4, 2, 50)

    with torch.device("meta"):
        m = build()
    inputs = call("llama_like", tokens(0, 0, 0), True)
    plan = tspc.plan(m, (), inputs, mesh=mesh, options=EAGER | options)
    plan.apply(m, mesh)
    m.to_empty(device="cpu")
    torch.manual_seed(5 + dist.get_rank())
    plan.init(m, build)
    torch.manual_seed(5)
    one = build()
    wrong = [
        n
        for (n, p), q in zip(m.named_parameters(), one.parameters())
        if not torch.equal(whole(p.detach()), q)
    ]
    m.double(), one.double()
    fn = torch.compile(m, backend="tsp", options=EAGER)
    loss_of(fn(**call("llama_like", tokens(0, 0, mine), True))).backward()
    every = torch.cat([tokens(0, 0, r) for r in range(2)])
    loss_of(one(**call("llama_like", every, True))).backward()
    grads = [{n: whole(p.grad) for n, p in x.named_parameters()} for x in (m, one)]
    return max(relative_errors(*grads).values()), wrong


@pytest.mark.parametrize("options", [{}, ZERO], ids=["replicate", "shard"])
def test_a_plan_applies_on_two_axes(world: Any, options: dict[str, Any]) -> None:
    for error, wrong in world(4).run(applied, options=options):
        assert error <= 1e-9 and not wrong


def held(options: dict[str, Any]) -> tuple[float, float, float]:
    """This rank's share of parameters, gradients and Adam's state."""
    mesh, _, mine = mesh_of((2, 2), FIRST)
    ends = []
    for tsp in (False, True):
        torch.manual_seed(0)
        m = LlamaLike(512, 64, 1, 8, 4, 256)
        given = {"mesh": mesh, **EAGER, **options}
        fn = torch.compile(m, backend="tsp", options=given) if tsp else m
        optimizer = torch.optim.AdamW(m.parameters())
        batch = tokens(0, 0, mine)
        fn(batch, batch).backward()
        optimizer.step()
        ends.append(state_bytes(m, optimizer))
    return tuple(ends[1][k] / ends[0][k] for k in ("parameters", "gradients", "optimizer"))


def test_what_each_rank_holds(world: Any) -> None:
    for shares in world(4).run(held, options={}):
        assert all(0.5 <= s <= 0.51 for s in shares)
    for shares in world(4).run(held, options=ZERO):
        assert all(0.25 <= s <= 0.26 for s in shares)


class Odd(LlamaLike):
    """Parts that are empty, a parameter used twice, frozen ones, unused ones, and one that only
    some calls use."""

    def __init__(self) -> None:
        super().__init__(187, 32, 1, 4, 2, 50)
        self.few, self.now_and_then = nn.Linear(2, 3), nn.Linear(32, 32)
        self.unused = nn.Linear(7, 5)
        self.embedding.weight.requires_grad_(False)
        self.few.bias.requires_grad_(False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, more: bool) -> torch.Tensor:
        w = self.few.weight
        extra = (self.few(w @ w.T @ w) @ w).square().sum()
        if more:
            x = self.embedding(tokens)
            extra = extra + self.now_and_then(x).square().mean()
        return super().forward(tokens, labels) + extra


def odd(options: dict[str, Any]) -> tuple[dict[str, float], int]:
    """The errors of gradients after backwards in turn, of which some do not reach `now_and_then`;
    rows of `few.weight` on this rank."""
    mesh, replicas, mine = mesh_of((2, 2), LAST)
    found: dict[str, float] = {}
    torch.manual_seed(0)
    m, one = Odd().double(), Odd().double()
    one.load_state_dict(m.state_dict())
    fn = torch.compile(m, backend="tsp", options={"mesh": mesh, **EAGER, **options})
    for name, turns in {
        "once": [(False, True)],
        "quiet, then not reached": [(True, True), (True, True), (False, False)],
        "averaged between": [(False, True), (True, True), (True, False), (False, True)],
    }.items():
        ends = []
        for model, call_it in ((m, fn), (one, one)):
            model.zero_grad()
            for micro, (quiet, more) in enumerate(turns):
                every = [tokens(0, micro, r) for r in range(replicas)]
                given = every[mine] if model is m else torch.cat(every)
                with tspc.no_sync(model) if quiet else contextlib.nullcontext():
                    twice = call_it(given, given, more) + call_it(given, given, more)
                    twice.backward()
            ends.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert ends[0].keys() == ends[1].keys()
        ends[0] = {n: whole(g) for n, g in ends[0].items()}
        found[name] = max(relative_errors(*ends).values())
    return found, len(m.few.weight.to_local())


@pytest.mark.parametrize(
    "options, rows",
    [pytest.param({}, [1, 1, 2, 2], marks=pytest.mark.wide), (ZERO, [0, 1, 1, 1])],
)
def test_parameters_used_twice_frozen_or_not_at_all(
    world: Any, options: dict[str, Any], rows: list[int]
) -> None:
    answers = world(4).run(odd, options=options)
    assert sorted(r for _, r in answers) == rows
    for found, _ in answers:
        assert len(found) == 3 and max(found.values()) <= 1e-9


def pending(options: dict[str, Any]) -> tuple[list[str], dict[str, float]]:
    """What is told of gradients that are kept, and that clearing `.grad` drops them."""
    mesh, replicas, mine = mesh_of((2, 2), FIRST)
    m, one = make("llama_like", layers=1), make("llama_like", layers=1)
    fn = torch.compile(m, backend="tsp", options={"mesh": mesh, **EAGER, **options})
    optimizer = torch.optim.AdamW(m.parameters(), foreach=True)
    every = [tokens(0, 0, r) for r in range(replicas)]

    def backward() -> None:
        loss_of(fn(**call("llama_like", every[mine], True))).backward()

    def quiet() -> None:
        with tspc.no_sync(m):
            backward()

    batch = torch.cat(every)
    loss_of(one(**call("llama_like", batch, True))).backward()
    wanted = {n: p.grad for n, p in one.named_parameters()}
    told, found = [], {}
    clip = torch.nn.utils.clip_grad_norm_
    for use in (
        optimizer.step,
        lambda: clip(m.parameters(), 1.0),
        lambda: m.head.weight.grad + 1,
        m.float,
    ):
        quiet()
        try:
            use()
        except tspc.PendingGradientError as e:
            told.append(str(e))
    for name, clear in {
        "optimizer": optimizer.zero_grad,
        "zeros": lambda: optimizer.zero_grad(set_to_none=False),  # all at once
        "module": lambda: fn.zero_grad(set_to_none=False),
        "one by one": lambda: [setattr(p, "grad", None) for p in m.parameters()],
    }.items():
        quiet()
        clear()
        if "zero" in name:
            assert all(not whole(p.grad).any() for p in m.parameters())
        backward()
        found[name] = max(
            relative_errors({n: whole(p.grad) for n, p in m.named_parameters()}, wanted).values()
        )
        quiet()
        clear()
    optimizer.zero_grad()
    quiet()
    loss_of(m(**call("llama_like", every[mine], True))).backward()  # not compiled
    backward()
    found["eager between"] = max(
        relative_errors({n: whole(p.grad) / 3 for n, p in m.named_parameters()}, wanted).values()
    )
    optimizer.step()
    return told, found


@pytest.mark.parametrize("options", [{}, ZERO], ids=["replicate", "shard"])
def test_no_kept_gradient_is_lost_in_silence(world: Any, options: dict[str, Any]) -> None:
    for told, found in world(4).run(pending, options=options):
        assert len(told) == 4 and all("zero_grad()" in t for t in told)
        assert told[0].startswith("AdamW.step()")
        assert len(found) == 5 and max(found.values()) <= 1e-9


def refused() -> list[str]:
    mesh, _, _ = mesh_of((2, 2), FIRST)
    told = []
    m = make("llama_like", layers=1)
    plan = tspc.plan(m, (tokens(0, 0, 0),), mesh=mesh)
    plan.apply(m, mesh)
    for use in (
        lambda: torch.compile(m, backend="tsp", options={"mesh": mesh["tsp"]})(tokens(0, 0, 0)),
        lambda: tspc.no_sync(m.forward).__enter__(),
    ):
        try:
            use()
        except Exception as e:
            told.append(str(e))
    return told


def test_what_does_not_fit_is_told(world: Any) -> None:
    for told in world(4).run(refused):
        assert "stored on a mesh of (2, 2) ranks" in told[0] and "no_sync takes a module" in told[1]


def other_parameters(options: dict[str, Any]) -> str:
    """What a backward tells, if the second replica has a gradient of a parameter less."""
    mesh, _, mine = mesh_of((2, 2), FIRST)
    m = make("llama_like", layers=1)
    m.head.weight.requires_grad_(mine == 0)
    fn = torch.compile(m, backend="tsp", options={**EAGER, **options, "mesh": mesh})
    loss = loss_of(fn(**call("llama_like", tokens(0, 0, mine), True)))
    try:
        loss.backward()
    except tspc.RankMismatchError as e:
        return str(e)
    return ""


@pytest.mark.parametrize("options", [{}, ZERO], ids=["replicate", "shard"])
def test_replicas_with_gradients_of_other_parameters(world: Any, options: dict[str, Any]) -> None:
    for told in world(4).run(other_parameters, options=options):
        assert "ranks [1] of axis 'replicas' differ from rank 0" in told
        assert "rank 0 has gradients of head.weight: float" in told
