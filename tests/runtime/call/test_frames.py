"""Calls of what was compiled: what runs whole outside of tspc's graphs is told once, or refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn as nn

from tests.support.group import stored
from tspc.base.errors import UnsupportedError
from tspc.runtime.call import frames
from tspc.runtime.call.frames import Compiled, enter, leave, tell, watched


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(frames, "EAGER", Compiled(None, has_graph=True))


def test_a_model_of_which_nothing_was_given(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(100, 100)
    run = watched(model.forward, model, False)
    with caplog.at_level(logging.WARNING, "tspc"):
        for _ in range(2):
            run(torch.ones(1, 100))
    (line,) = caplog.messages
    assert "Linear: Dynamo gave tspc nothing of it: it runs whole on every rank, with 2" in line
    assert "parameters of 39.5 KiB" in line
    strict = watched(model.forward, model, True)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="or allow it by strict=False"):
            strict(torch.ones(1, 100))


def test_a_call_with_a_graph_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(3, 3)

    def compiled(x: torch.Tensor) -> torch.Tensor:
        frames.ran()
        return model(x)

    def given(x: torch.Tensor) -> torch.Tensor:
        frames.given()
        return x

    with caplog.at_level(logging.WARNING, "tspc"):
        assert watched(compiled, model, True)(torch.ones(1, 3)).shape == (1, 3)
        watched(given, model, True)(torch.ones(1))
        watched(lambda x: x, len, True)(torch.ones(1))
    assert not caplog.messages and not frames._open()


def test_weights_used_whole_are_listed(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(600, 600), nn.Linear(2, 2))
    of = Compiled(lambda: model, has_graph=True)
    call = enter(of)
    frames.used(model[0], "weight", model[0].weight)
    frames.used(model[0], "weight", model[0].weight)
    frames.used(model[1], "bias", model[1].bias)
    leave(call)
    frames.used(model[1], "weight", model[1].weight)  # outside of a call
    with caplog.at_level(logging.WARNING, "tspc"):
        tell(call)
    (line,) = caplog.messages
    assert "Sequential: used whole on every rank" in line and "0.weight, 1.bias, 1.4 MiB" in line
    assert "test_frames.py:" in line


def test_eager_calls_of_a_stored_module_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with (
        stored(nn.Linear(3, 4)) as (m, _),
        caplog.at_level(logging.WARNING, "tspc"),
    ):
        for _ in range(2):
            m(torch.ones(1, 3))
    lines = [t for t in caplog.messages if "used whole" in t]
    assert len(lines) == 1 and "Linear.weight" in lines[0]
    assert "the module is called without torch.compile" in lines[0]
    assert frames.eager(m) is None


def test_modules_that_a_function_has_at_hand() -> None:
    inner, other = nn.Linear(1, 1), nn.Linear(1, 1)

    def helper(x: torch.Tensor) -> torch.Tensor:
        return inner(x)

    def step(x: torch.Tensor) -> torch.Tensor:
        return helper(x)

    assert frames._modules(step, ((other,), {})) == [other, inner]
    assert frames._name(inner) == "Linear" and frames._name(step) == "step"
    assert frames._name(3) == "?" and frames._ranks() == 2


def test_an_empty_cell_holds_nothing() -> None:
    def outer() -> Any:
        def fn() -> object:
            return later

        if len("x") > 2:
            later = 3
        return fn

    (cell,) = outer().__closure__
    assert not frames._filled(cell)


def test_what_is_compiled_with_a_backend_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import eval_frame

    context = eval_frame._TorchDynamoContext
    monkeypatch.setattr(context, "__call__", context.__call__)
    seen: list[object] = []
    monkeypatch.setattr(frames, "watched", lambda c, root, s, prepare: seen.append(root) or c)

    def backend(gm: torch.fx.GraphModule, inputs: object) -> Any:
        return gm.forward

    frames.watch(backend, len)
    model = nn.Linear(2, 2)
    torch.compile(model, backend=backend)
    assert seen == [model]


def test_modules_at_hand_are_prepared_until_there_is_a_graph() -> None:
    model, prepared = nn.Linear(2, 2), list[list[nn.Module]]()

    def compiled(x: torch.Tensor) -> torch.Tensor:
        inside.append(frames.of_module())
        if len(prepared) == 2:
            frames.ran()
        return x

    inside: list[bool] = []
    run = watched(compiled, model, False, prepared.append)
    for _ in range(3):
        run(torch.ones(1))
    assert prepared == [[model], [model]] and all(inside) and not frames.of_module()

    def step(m: nn.Module) -> nn.Module:
        return m

    watched(compiled, step, False, prepared.append)(model)
    assert prepared[-1] == [model] and not inside[-1]
