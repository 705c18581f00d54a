"""Checks of arguments: what is right passes, what is wrong is named with what to give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn

from tspc.base import usage
from tspc.base.errors import OptionError, PlanError

MODEL = nn.Linear(2, 2)


def test_a_value_is_said_with_its_type_and_short() -> None:
    assert usage.said(torch.ones(3)) == "a Tensor"
    assert usage.said(nn.GELU()) == "a GELU"
    assert usage.said("ab") == "'ab' (str)"
    text = usage.said(list(range(100)))
    assert text.endswith("... (list)") and len(text) == 60 + len(" (list)")


RIGHT: list[tuple[Any, ...]] = [
    (usage.check_module, MODEL),
    (usage.check_called, MODEL, (1,), {"x": 1}),
    (usage.check_called, max, [1], None),
    (usage.check_ranks, 1),
    (usage.check_ranks, usage.MOST),
    (usage.check_mesh, None),
    (usage.check_name, "blocks.0"),
    (usage.check_function, "build", None),
    (usage.check_function, "build", len),
    (usage.check_tolerance, 0),
    (usage.check_tolerance, 1e-9),
    (usage.check_parameters, MODEL),
]


@pytest.mark.parametrize("case", RIGHT, ids=lambda c: f"{c[0].__name__}-{c[1:]}")
def test_what_is_right_passes(case: tuple[Any, ...]) -> None:
    check, *args = case
    assert check("here", *args) is None


@pytest.mark.parametrize(
    "check,args,text",
    [
        (usage.check_module, (3,), r"here takes a torch.nn.Module.*it was given 3 \(int\)"),
        (usage.check_called, (nn.Linear, (), None), "here takes a torch.nn.Module"),
        (usage.check_called, (3, (), None), r"here takes .* 3 \(int\)"),
        (usage.check_called, (MODEL, "x", None), r"args is a tuple of the inputs, not 'x' \(str"),
        (usage.check_called, (MODEL, {1}, None), r"\(here\(model, \(x,\)\) for one input\)"),
        (usage.check_called, (MODEL, (), [1]), r"kwargs is a dict by name, not \[1\]"),
        (usage.check_called, (MODEL, (), {1: 2}), "kwargs is a dict by name"),
        (usage.check_ranks, (0,), "an int from 1 to 4096, not 0"),
        (usage.check_ranks, (True,), "not True"),
        (usage.check_ranks, (usage.MOST + 1,), "not 4097"),
        (usage.check_mesh, ((2,),), "mesh is a DeviceMesh"),
        (usage.check_name, (3,), "a str, not 3"),
        (usage.check_function, ("build", 3), "build is a function, not 3"),
        (usage.check_tolerance, (-1,), "a relative error >= 0, not -1"),
        (usage.check_tolerance, (float("nan"),), "not nan"),
        (usage.check_tolerance, (True,), "not True"),
    ],
)
def test_what_is_wrong_is_an_option_error(check: Any, args: tuple[Any, ...], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        check("here", *args)


def test_only_modules_where_one_is_asked_for() -> None:
    with pytest.raises(OptionError, match="takes a torch.nn.Module"):
        usage.check_called("here", max, (), None, module=True)


def test_a_model_without_parameters() -> None:
    with pytest.raises(PlanError, match="here: GELU has no parameters"):
        usage.check_parameters("here", nn.GELU())
