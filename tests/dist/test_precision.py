"""Real gloo processes: autocast with a GradScaler, checkpointed blocks, `param_dtype`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.support.models import tokens_of
from tests.tspc.frontend.test_checkpoint import model

pytestmark = pytest.mark.dist


def steps(tsp: bool, options: dict[str, Any]) -> tuple[list[float], float, bool, str]:
    """Losses of three steps, of which the second overflows on rank 0 only; the scale after them,
    whether that step was skipped, and the type of the gradients."""
    m, tokens = model("block", 1).float(), tokens_of(16)
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2, fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fn = torch.compile(m, backend="tsp", options=options) if tsp else m
    losses, skipped, kind = [], False, ""
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = fn(tokens, tokens)
        scaler.scale(loss).backward()
        p = m.head._parameters["weight"]
        assert p is not None and p.grad is not None
        g, kind = p.grad, str(p.grad.dtype)
        local = g.to_local() if isinstance(g, DTensor) else g
        if step == 1 and (not tsp or torch.distributed.get_rank() == 0):
            local[0, 0] = torch.inf
        before = p.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            same = p.detach() == before
            skipped = bool((same.full_tensor() if isinstance(same, DTensor) else same).all())
        losses.append(float(loss.detach()))
    return losses, scaler.get_scale(), skipped, kind


def both(options: dict[str, Any]) -> list[Any]:
    return [steps(False, options), steps(True, options)]


@pytest.mark.parametrize(
    "options", [{"param_dtype": torch.bfloat16}, pytest.param({}, marks=pytest.mark.wide)]
)
def test_autocast_with_a_scaler_and_checkpoints(world: Any, options: dict[str, Any]) -> None:
    answers = world(2).run(both, options=options)
    for one, mine in answers:
        assert one[2] and mine[2] and one[1] == mine[1] == 2.0**9
        assert mine[3] == "torch.float32"
        assert all(abs(a - b) <= 0.02 * abs(a) for a, b in zip(one[0], mine[0])), (one, mine)
        assert mine[0][2] < mine[0][0]
    assert answers[0][1] == answers[1][1]
