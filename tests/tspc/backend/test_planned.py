"""Whether the model is the one that was planned, and what was chosen goes with the ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn

from tests.support.group import alone
from tspc.backend import planned
from tspc.backend.planned import check_chosen, check_planned, parameters_of
from tspc.base.errors import OptionError, PlanError
from tspc.base.options import Options, parse
from tspc.runtime.mesh import resolve

MODEL = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4, bias=False))
PLANNED = {"0.weight": "float32[6, 4]", "0.bias": "float32[6]", "1.weight": "float32[4, 6]"}


def test_names_shapes_and_types() -> None:
    assert parameters_of(MODEL) == PLANNED
    compiled = torch.compile(MODEL, backend="eager")
    assert parameters_of(nn.ModuleList([compiled])) == {f"0.{n}": t for n, t in PLANNED.items()}


def test_the_planned_module_or_a_part_of_it() -> None:
    check_planned("x", {}, MODEL)
    check_planned("x", PLANNED, MODEL)
    check_planned("x", PLANNED, nn.ModuleDict({"m": MODEL}))


def test_another_model() -> None:
    wrong = {**PLANNED, "0.bias": "float32[7]", "2.weight": "float32[1]"}
    with pytest.raises(PlanError) as e:
        check_planned("options", wrong, MODEL)
    assert str(e.value) == (
        "options: the plan is of another model than Sequential: 0.bias is float32[6], float32[7] "
        "in the plan; 2.weight is not there, float32[1] in the plan: plan this model"
    )
    with pytest.raises(PlanError, match=r"in the plan and 2 more: plan this model"):
        check_planned("options", dict.fromkeys("abcde", "x") | PLANNED, MODEL)


def test_what_goes_with_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "compiled_roots", lambda gm: [MODEL])
    plan: Any = type("P", (), {"ranks": 2, "parameters": PLANNED})()
    gm: Any = torch.fx.GraphModule({}, torch.fx.Graph())
    with alone():
        place, _ = resolve(parse(None), torch.device("cpu"))
        check_chosen(Options(), None, place, gm)
        with pytest.raises(OptionError, match="mode='max-autotune' is Inductor's and works on one"):
            check_chosen(Options(), "max-autotune", place, gm)
        with pytest.raises(PlanError, match="the plan is for 2 ranks, the axis has 1: plan again"):
            check_chosen(Options(plan=plan), None, place, gm)
        plan.ranks = 1
        check_chosen(Options(plan=plan), None, place, gm)
        plan.parameters = {**PLANNED, "0.bias": "float32[7]"}
        with pytest.raises(PlanError, match="options: the plan is of another model"):
            check_chosen(Options(plan=plan), None, place, gm)
