"""Bad arguments of the public functions: a `TspcError` that says what, where and what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn as nn

import tspc
from tspc import api
from tspc.base.options import Options, parse

MODEL = nn.Linear(4, 4)
X = torch.ones(2, 4, 4)
PLAN = tspc.Plan(2, None, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [0, -1, 1.5, "2", 10**6, True, [2]])
@pytest.mark.parametrize("function", [tspc.plan, tspc.verify])
def test_ranks(function: Any, ranks: Any) -> None:
    text = re.escape(f"{function.__name__}(...): ranks is how many ranks the axis has, an int from")
    with pytest.raises(tspc.OptionError, match=text):
        function(MODEL, (X,), ranks=ranks)


def test_no_ranks() -> None:
    with pytest.raises(tspc.PlanError, match=r"needs ranks= or mesh="):
        tspc.plan(MODEL, (X,))
    with pytest.raises(tspc.OptionError, match=r"an int from 1 to 4096, not None"):
        tspc.verify(MODEL, (X,), ranks=None)  # type: ignore[arg-type]


def _no_sync(model: Any) -> None:
    with tspc.no_sync(model):
        pass


@pytest.mark.parametrize(
    "function,where",
    [
        (lambda m: tspc.plan(m, (X,), ranks=2), "plan"),
        (lambda m: tspc.verify(m, (X,)), "verify"),
        (tspc.explain, "explain"),
        (PLAN.apply, "plan.apply"),
        (PLAN.init, "plan.init"),
        (_no_sync, "no_sync"),
    ],
)
@pytest.mark.parametrize("model", [None, 3, "m", [MODEL], nn.Linear], ids=str)
def test_no_module(function: Any, where: str, model: Any) -> None:
    with pytest.raises(tspc.TspcError, match=rf"{where}.* takes .*[Mm]odule.*given"):
        function(model)


@pytest.mark.parametrize(
    "call,text",
    [
        (lambda: tspc.plan(MODEL, X, ranks=2), r"args is a tuple .*plan\(model, \(x,\)\)"),
        (lambda: tspc.verify(MODEL, None), "args is a tuple of the inputs, not None"),
        (lambda: tspc.plan(MODEL, (X,), [X], ranks=2), "kwargs is a dict by name"),
        (lambda: tspc.plan(MODEL, (), {3: X}, ranks=2), "kwargs is a dict by name"),
        (lambda: tspc.plan(MODEL, (X,), mesh=(2,)), r"mesh is a DeviceMesh.*not \(2,\) \(tuple"),
        (lambda: PLAN.apply(MODEL, (2,)), "plan.apply.*mesh is a DeviceMesh"),
        (lambda: PLAN.apply(nn.GELU()), "GELU has no parameters"),
        (lambda: PLAN.init(MODEL, build=3), "build is a function, not 3"),
        (lambda: PLAN.init(MODEL, init_fn="zeros"), "init_fn is a function, not 'zeros'"),
        (lambda: PLAN.origin(3), "name is that of a region.*not 3"),
        (lambda: tspc.explain(MODEL, 3), "name is that of a region.*not 3"),
        (lambda: tspc.verify(MODEL, (X,), tolerance="x"), "tolerance is a relative error"),
    ],
)
def test_other_arguments(call: Any, text: str) -> None:
    with pytest.raises(tspc.TspcError, match=text):
        call()


@pytest.mark.parametrize(
    "given,text",
    [
        ([("strict", True)], "options is a dict by name, not "),
        ("strict", "options is a dict by name, not 'strict'"),
        ({1: 2}, "unknown option 1"),
        ({"mesh": (2,)}, r"mesh is a DeviceMesh, as init_device_mesh.*not \(2,\)"),
        ({"axis": 3}, "axis is the name of a dim of the mesh, not 3"),
        ({"plan": MODEL}, "plan is what tspc.plan.* not a Linear"),
        ({"hardware": [1]}, r"hardware=\[1\]; valid"),
        ({"schedule": {1: "ring"}}, "names or globs are strings"),
        ({"schedule": ["ring"]}, "schedule="),
        ({"schedule": X}, "schedule="),
        ({"check_inputs": X}, "check_inputs="),
        ({"compiler": ["eager"]}, "compiler="),
        ({"param_dtype": [torch.float32]}, "param_dtype="),
    ],
)
def test_options(given: Any, text: str) -> None:
    with pytest.raises(tspc.OptionError, match=text):
        parse(given)


def test_no_options() -> None:
    assert parse(None) == parse({}) == Options()


def test_a_mode_is_inductors() -> None:
    """On one rank it is passed on."""
    compiled = torch.compile(MODEL, backend="tsp", mode="max-autotune-no-cudagraphs")
    with torch._inductor.config.patch(coordinate_descent_tuning=False):
        assert torch.allclose(compiled(X), MODEL(X))
    torch._dynamo.reset()
    with pytest.raises(tspc.OptionError, match="mode='fastest'; valid: 'default'"):
        torch.compile(MODEL, backend="tsp", mode="fastest")(X)


def test_the_device_of_a_plan() -> None:
    assert api._device([3, X], None) == torch.device("cpu")


def test_a_model_as_it_is_compiled() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    plan = tspc.plan(model, (X,), ranks=2)
    assert "fold[" in str(plan)
    verified = tspc.verify(model, (X,), ranks=2)
    assert verified.graphs
