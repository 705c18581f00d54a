"""Training scripts that hypothesis draws from a grammar of models and of what is done around them
equal one device's on simulated ranks: losses, gradients, parameters after two steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor

from tests.support.script_models import Model, loss_of, make
from tests.support.scripts import Script, batches, scripts
from tspc.backend.reference import reference_backend
from tspc.backend.simulated import Simulated, relative_errors, simulated_backend
from tspc.base.options import parse

pytestmark = pytest.mark.slow
CHUNKS = 8
Outcome = dict[str, dict[str, Tensor]]


def train(fn: Callable[..., Any], model: Model, s: Script, seed: int) -> Outcome:
    """Two steps on the batches of a seed; the model is left as it was."""
    parameters = dict(model.named_parameters())
    start = {n: p.detach().clone() for n, p in parameters.items()}
    # eps: Adam magnifies the rounding of a gradient that is exactly zero by 1 / eps
    live = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(live, lr=0.1)
    if s.adam:
        optimizer = torch.optim.AdamW(live, lr=1e-2, eps=1e-4)
    torch.manual_seed(2)
    losses: dict[str, Tensor] = {}
    logits: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}
    for step, micro in enumerate(batches(s, seed)):
        for i, batch in enumerate(micro):
            out = fn(*batch)
            if s.loss == "beside":
                out, logits[f"{step} {i}"] = out[0], out[1].detach().clone()
            loss = loss_of(s, out, batch[2]) if s.loss == "outside" else out
            losses[f"{step} {i}"] = loss.detach()
            (loss / s.accumulation).backward()
        if not step:
            grads = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
            assert grads.keys() == {n for n, p in parameters.items() if p.requires_grad}
        if s.clip:
            torch.nn.utils.clip_grad_norm_(live, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    moved = {n: p.detach() - start[n] for n, p in parameters.items()}
    with torch.no_grad():
        for n, p in parameters.items():
            p.copy_(start[n])
    return {"loss": losses, "logits": logits, "gradient": grads, "step of": moved}


def every(fn: Callable[..., Any], model: Model, s: Script) -> list[Outcome]:
    """Rounding is judged by several weights and batches."""
    found = []
    for draw in range(1 if s.dtype == torch.float64 else 8):
        with torch.no_grad():
            for p, other in zip(model.parameters(), make(s, draw).parameters()):
                p.copy_(other)
        found.append(train(fn, model, s, draw))
    return found


def on_one_device(model: Model, s: Script) -> list[Outcome]:
    if not s.dropout:
        return every(model, model, s)
    torch._dynamo.reset()
    return every(torch.compile(model, backend=reference_backend), model, s)


def on_ranks(model: Model, s: Script) -> tuple[list[Outcome], list[Simulated]]:
    made: list[Simulated] = []
    torch._dynamo.reset()
    backend = simulated_backend(s.ranks, parse(s.options), made)
    return every(torch.compile(model, backend=backend, dynamic=s.dynamic), model, s), made


def error(mine: list[Outcome], exact: list[Outcome], kind: str) -> float:
    """The relative error of all tensors of a kind as one, the mean over the batches: that of one
    small tensor is a matter of luck."""
    found = []
    for x, e in zip(mine, exact):
        a, b = (torch.cat([o[kind][n].double().flatten() for n in e[kind]]) for o in (x, e))
        found.append(float((a - b).norm() / b.norm()))
    return sum(found) / len(found)


def check(s: Script) -> None:
    """Raises `AssertionError` with the script: `check(Script(...))` replays it."""
    model = make(s)
    mine, made = on_ranks(model, s)
    one = on_one_device(model, s)
    assert made and all(g.rewritten.folds for g in made), f"nothing is folded: {s}"
    if s.dtype == torch.float64:
        for kind in one[0]:
            errors = relative_errors(mine[0][kind], one[0][kind])
            wrong = {n: e for n, e in errors.items() if not e <= 1e-9}
            assert not wrong, f"{kind} {wrong}: {s}"
        return
    exact = on_one_device(copy.deepcopy(model).float(), s)
    for kind in ("loss", "gradient", "step of"):
        ours, own = error(mine, exact, kind), error(one, exact, kind)
        assert ours <= 1.5 * own + 2e-3, f"{kind} {ours} beside {own}: {s}"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_equals_one_device(chunk: int, request: pytest.FixtureRequest) -> None:
    @seed(chunk)
    @settings(
        max_examples=request.config.getoption("--scripts") // CHUNKS,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(scripts())
    def run(s: Script) -> None:
        check(s)

    run()
