"""A step of one rank without values: its memory against one that runs, what it sends against what
is sent, on a device that is not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn

import tspc
from examples.llama_like import LlamaLike
from tspc.backend.dry import DryRun, dry_run
from tspc.backend.tsp import GRAPHS
from tspc.base.errors import OptionError
from tspc.runtime.attention import facts
from tspc.runtime.comm.drivers import record

IDS = torch.zeros(2, 64, dtype=torch.long)


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.device("meta"):
        return LlamaLike(64, 32, 2, 4, 2, 64).to(dtype)


def run(model: nn.Module, *args: torch.Tensor, ranks: int = 4, **how: Any) -> DryRun:
    options = how.pop("options", None)
    return tspc.plan(model, args, ranks=ranks, options=options).dry_run(**how)


def test_a_step_on_a_device_that_is_not_here() -> None:
    r = run(llama(torch.bfloat16), IDS, IDS)
    assert r.waits == () and r.kernels == ("flash",)
    assert r.peak == sum(r.memory.values()) > 0 and r.flops > 0
    text = str(r)
    assert "peak: " in text and "waits of the host: none" in text and "attention: flash" in text
    assert facts.noted() == ((), ())


def test_what_lives_between_steps_is_the_ranks_share() -> None:
    model = llama()
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    for optimizer, times in ((torch.optim.AdamW, 2), (torch.optim.SGD, 0)):
        r = run(model, IDS, IDS, optimizer=optimizer)
        share = r.memory["parameters"]
        assert whole / 4 <= share <= 1.05 * whole / 4  # norms are on every rank
        assert r.memory.get("optimizer state", 0) == times * share


def sent_by(schedule: str, ids: torch.Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a step, as they were sent and as a dry run has them."""
    torch.manual_seed(0)
    model, options = LlamaLike(64, 32, 2, 4, 2, 64), {"schedule": schedule, "compiler": "eager"}
    fn = torch.compile(model, backend="tsp", options=options)
    fn(ids, ids).backward()
    with record() as sent:
        fn(ids, ids).backward()
    wanted: dict[str, int] = {}
    for s in sent:
        wanted[s.kind] = wanted.get(s.kind, 0) + round(s.elements * s.dtype.itemsize)
    (graph,) = GRAPHS[model]
    dry = dry_run(graph.rewritten, graph.sizes, "cpu", None)
    return wanted, dict(dry.traffic)


@pytest.mark.dist
@pytest.mark.parametrize("schedule", ["broadcast", "gather", "stationary", "ring"])
def test_it_sends_what_a_step_sends(world: Any, schedule: str) -> None:
    for wanted, dry in world(2).run(sent_by, schedule=schedule, ids=IDS):
        assert dry == wanted and dry


def test_less_is_kept_where_the_budget_is_small() -> None:
    peaks = [
        run(llama(), IDS, IDS, options={"memory_budget": b}).peak for b in ("min", "max-speed")
    ]
    assert peaks[0] < peaks[1]


def test_a_batch_that_is_read_is_a_wait() -> None:
    """Documents in one sequence: which blocks they hide is read once."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, doc: torch.Tensor) -> torch.Tensor:
            q, k, v = self.up(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            mask = (doc[:, None, :, None] == doc[:, None, None, :]).tril()
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.down(y.transpose(1, 2).flatten(2)).square().mean()

    r = run(Packed(), torch.zeros(2, 64, 32), torch.zeros(2, 64, dtype=torch.long), ranks=2)
    assert len(r.waits) == 1 and "once a batch" in r.waits[0]


def test_without_a_backward_there_is_no_optimizer() -> None:
    with torch.no_grad():
        r = run(llama(), IDS, device="cpu")
    assert "optimizer state" not in r.memory and r.kernels == ("CPU flash",)


def test_arguments_that_are_none() -> None:
    plan = tspc.plan(llama(), (IDS, IDS), ranks=2)
    with pytest.raises(OptionError, match="device is a kind"):
        plan.dry_run(device="gpu")
    with pytest.raises(OptionError, match="device is a kind"):
        plan.dry_run(device=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="optimizer"):
        plan.dry_run(optimizer="adam")  # type: ignore[arg-type]
