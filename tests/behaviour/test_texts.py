"""Programs of models and of samples as text: what is printed parses back to the same program, after
every pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tests.behaviour.test_samples as samples
import tspc
from examples.gpt2_like import GPT2Like
from tests.support.zoo import ZOO, build
from tests.tspc.ir.test_text import check
from tspc.backend.brute import traced
from tspc.ir.program import Program
from tspc.passes import pipeline
from tspc.passes.lower.unit import Unit
from tspc.passes.runner import Pass


@pytest.fixture
def each_stage(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Check the text after each pass; -> the passes that ran."""
    ran: list[str] = []

    def after(step: Pass) -> Callable[[Unit], Unit]:
        def both(u: Unit) -> Unit:
            u = step.run(u)
            check(u.program)
            assert Program.parse(str(u)).nodes
            ran.append(step.name)
            return u

        return both

    steps = tuple(Pass(p.name, after(p)) for p in pipeline.PIPELINE)
    monkeypatch.setattr(pipeline, "PIPELINE", steps)
    return ran


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ZOO)
def test_of_a_model(name: str, each_stage: list[str]) -> None:
    model, kwargs = build(name, 24)
    tspc.plan(model, (), kwargs, ranks=3)
    assert each_stage[-1] == "localize"


@pytest.mark.parametrize("outputs", ["full", "sharded"])
def test_of_outputs(outputs: str, each_stage: list[str]) -> None:
    tokens = torch.zeros(2, 16, dtype=torch.long)
    tspc.plan(GPT2Like(layers=1), (tokens,), ranks=2, options={"outputs": outputs})
    assert each_stage


@pytest.mark.parametrize("group", samples.GROUPS)
def test_of_samples(group: str) -> None:
    for fn, args in samples.GROUPS[group]():
        check(traced(fn, *args)[0].program)
