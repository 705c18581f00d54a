"""The passes in their order: which rewrite and which decide, that they run no op and write no
registry. `tests/golden/passes/` has each from text to text, for the test of its module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tspc
from tests.support.goldens import ARROW, BY_NAME, FILES, FOLDER, cases
from tests.support.programs import program_of
from tests.support.zoo import build
from tspc.base import state
from tspc.ir.program import SEED, Program
from tspc.passes import pipeline
from tspc.passes.lower.unit import Unit
from tspc.passes.pipeline import PIPELINE
from tspc.passes.runner import run
from tspc.seams.tensors import TorchDispatchMode, no_modes

DECIDE = {"lookups", "factorize", "choose", "pieces", "budget", "localize"}  # and leave the program


def test_each_pass_that_rewrites_has_three() -> None:
    count = {name: len(list((FOLDER / name).glob("*.txt"))) for name in BY_NAME}
    assert {n for n, k in count.items() if k < 3} == DECIDE
    assert {p.parent.name for p in FILES} <= set(BY_NAME)


@cases()
def test_a_pass_that_decides_leaves_the_program(path: Path) -> None:
    program = Program.parse(path.read_text().partition(ARROW)[0])
    unit = Unit(program, tuple(program.symbols), ranks=2)
    for step in PIPELINE:
        after = run([step], unit)
        if step.name in DECIDE:
            assert after.program is unit.program
        unit = after


class NoOps(TorchDispatchMode):
    """Any op is an error, but for one that is of types alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.promote_types.default:
            return func(*args)
        raise AssertionError(f"a pass runs {func}")


def registries() -> dict[str, int]:
    held = [r.what if hasattr(r.what, "__len__") else vars(r.what) for r in state.REGISTRIES]
    return {f"{r.module}, {k}": len(held[k]) for k, r in enumerate(state.REGISTRIES)}


@pytest.mark.parametrize("name", ["llama", "vit", "t5"])
def test_passes_run_no_op_and_write_no_registry(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(u: Unit, real: Any = pipeline.rewrite) -> Unit:
        before = registries()
        with no_modes(), NoOps():
            u = real(u)
        assert registries() == before
        return u

    monkeypatch.setattr("tspc.frontend.capture.rewrite", alone)
    model, kwargs = build(name, 24)
    plan = tspc.plan(model, (), kwargs, ranks=3)
    assert len(str(plan)) > 1000


def test_an_op_in_a_pass_is_seen() -> None:
    with pytest.raises(AssertionError, match="a pass runs aten"), NoOps():
        torch.ones(2) + 1


def test_a_program_as_one_device_runs_it() -> None:
    program = program_of(lambda x: [torch.nn.functional.dropout(x, 0.5)], torch.zeros(2, 3))
    prepared = pipeline.prepare(program)
    assert [n.name for n in prepared.nodes].count(SEED) == 1
    assert not any(str(n.op) == "aten.dropout.default" for n in prepared.nodes)
