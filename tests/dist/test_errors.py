"""Bad input over gloo: every rank is told what differs, where and what to do; no rank waits."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import tspc
from tests.support.models import make, tokens_of
from tests.behaviour.test_errors import Renormed

pytestmark = [pytest.mark.dist, pytest.mark.sampled(2)]
EAGER = {"compiler": "eager"}


def _told(call: Callable[[], Any]) -> str:
    """The message of what `call` raises."""
    try:
        call()
    except Exception as e:
        return str(e)
    return ""


def _match(texts: list[str], pattern: str) -> None:
    for text in texts:
        assert re.search(pattern, text), text


def lengths_at(before: list[int], lengths: list[int]) -> str:
    """Alike calls of some lengths, then one of each rank's own length."""
    fn = torch.compile(make("llama_like", layers=1).float(), backend="tsp", options=EAGER)
    for n in before:
        fn(tokens_of(n))
    return _told(lambda: fn(tokens_of(lengths[dist.get_rank()])))


@pytest.mark.parametrize(
    "before,lengths,first,second",
    [
        ([], [8, 12], "compiles a graph of", "compiles a graph of"),
        ([8], [8, 12], "was called with", "compiles a graph of"),
        ([8, 9, 9, 9, 9, 9], [10, 12], "was called with", "was called with"),
    ],
)
def test_ranks_with_other_shapes(
    world: Any, before: list[int], lengths: list[int], first: str, second: str
) -> None:
    told = world(2).run(lengths_at, before=before, lengths=lengths)
    _match(
        told,
        rf"ranks \[1\] of axis 'tsp_0_1' differ from rank 0: rank 0 {first} tokens: "
        rf"int64\[2, {lengths[0]}\]; rank 1 {second} tokens: int64\[2, {lengths[1]}\]. Do this: "
        "all ranks of the TSP axis run the same model on the same, full batch; use one sampler",
    )


def other_tokens() -> str:
    fn = torch.compile(make("llama_like", layers=1).float(), backend="tsp", options=EAGER)
    return _told(lambda: fn(tokens_of(8, seed=dist.get_rank())))


def test_ranks_with_other_tokens(world: Any) -> None:
    pattern = r"ranks \[1\] .* rank 1 was given other values in tokens: .*one sampler seed"
    _match(world(2).run(other_tokens), pattern)


def frozen_on_one() -> str:
    m = make("llama_like", layers=1).float()
    m.head.weight.requires_grad_(dist.get_rank() == 0)
    return _told(lambda: torch.compile(m, backend="tsp", options=EAGER)(tokens_of(8)))


def test_ranks_with_other_frozen_parameters(world: Any) -> None:
    pattern = r"ranks \[1\] .* rank 1 compiles a graph of .*head.weight: float32\[187, 32\] frozen"
    _match(world(2).run(frozen_on_one), pattern)


def one_is_other(what: str) -> str:
    """After an alike call: rank 1 freezes a parameter, or calls without gradients."""
    m = make("llama_like", layers=1).float()
    fn = torch.compile(m, backend="tsp", options=EAGER)
    fn(tokens_of(8))
    mine = dist.get_rank() == 1
    m.head.weight.requires_grad_(not mine or what != "frozen")
    with torch.set_grad_enabled(not mine or what != "no_grad"):
        return _told(lambda: fn(tokens_of(8)))


@pytest.mark.parametrize(
    "what,pattern",
    [
        ("frozen", "rank 1 compiles a graph of frozen parameters: head.weight"),
        (
            "no_grad",
            "rank 0 was called with grad mode: enabled; rank 1 compiles a graph of grad mode: "
            "disabled",
        ),
    ],
)
def test_ranks_of_another_mode(world: Any, what: str, pattern: str) -> None:
    _match(world(2).run(one_is_other, what=what), pattern)


def other_ops() -> str:
    act = torch.nn.GELU() if dist.get_rank() else torch.nn.SiLU()
    m = torch.nn.Sequential(torch.nn.Linear(16, 32), act, torch.nn.Linear(32, 16))
    fn = torch.compile(m, backend="tsp", options=EAGER)
    return _told(lambda: fn(torch.ones(2, 8, 16)))


def test_ranks_with_other_ops(world: Any) -> None:
    told = world(2).run(other_ops)
    pattern = (
        r"ranks \[1\] .* rank 0 compiles a graph of op 1: aten.silu.default; "
        r"rank 1 compiles a graph of op 1: aten.gelu.default"
    )
    _match(told, pattern)


def on_another_device(mesh: bool) -> str:
    m = make("llama_like", layers=1).float().to("meta")
    given = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh else None
    fn = torch.compile(m, backend="tsp", options={**EAGER, "mesh": given})
    return _told(lambda: fn(tokens_of(8).to("meta")))


@pytest.mark.parametrize("mesh", [True, False])
def test_a_model_on_another_device_than_the_mesh(world: Any, mesh: bool) -> None:
    pattern = r"the model is on meta, the mesh on cpu: .*to_empty" if mesh else r"on meta.*to_empty"
    _match(world(2).run(on_another_device, mesh=mesh), pattern)


def wrong_mesh() -> list[str]:
    """What a mesh or plan that does not fit is told."""
    ranks = dist.get_world_size()
    flat = init_device_mesh("cpu", (ranks,), mesh_dim_names=("x",))
    other = tspc.plan(make("llama_like").float(), (tokens_of(8),), ranks=ranks + 1)
    said = []
    for options in ({"mesh": flat, "axis": "tsp"}, {"plan": other}):
        fn = torch.compile(make("llama_like").float(), backend="tsp", options=options)
        said.append(_told(lambda fn=fn: fn(tokens_of(8))))
    return said


def test_a_mesh_or_plan_that_does_not_fit(world: Any) -> None:
    for mesh, plan in world(2).run(wrong_mesh):
        assert "the mesh has no axis 'tsp'; its axes are x" in mesh
        assert "the plan is for 3 ranks, the axis has 2" in plan


def strict() -> str:
    fn = torch.compile(Renormed(), backend="tsp", options={**EAGER, "strict": True})
    return _told(lambda: fn(tokens_of(8) % 32))


def test_strict_makes_an_op_without_a_rule_an_error(world: Any) -> None:
    pattern = r"test_errors.py:\d+: aten.renorm.* has no rule .*strict=False"
    _match(world(2).run(strict), pattern)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def warned() -> tuple[list[str], str]:
    """The lines logged in the first call, and what is explained."""
    lines = _Lines()
    logging.getLogger("tspc").addHandler(lines)
    fn = torch.compile(Renormed(), backend="tsp", options=EAGER)
    fn(tokens_of(8) % 32)
    logging.getLogger("tspc").removeHandler(lines)
    return lines.lines, tspc.explain(fn)


def test_an_op_without_a_rule_is_warned_of_once(world: Any) -> None:
    told = world(2).run(warned)
    about = [l for lines, _ in told for l in lines if "aten.renorm" in l]
    assert len(about) == 1, about
    assert re.search(r"test_errors.py:\d+: aten.renorm.* has no rule and runs replicated", about[0])
    for _, text in told:
        assert re.search(r"test_errors.py:\d+: aten.renorm.* has no rule", text), text
