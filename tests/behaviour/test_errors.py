"""Bad input: each a clear error that says what, where and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.utils import counters

import tspc
from examples.llama_like import LlamaLike
from tspc.backend.simulated import simulated_backend
from tspc.base.options import parse

pytestmark = pytest.mark.sampled(2)

TOKENS = torch.zeros(2, 8, dtype=torch.long)


def test_unknown_option() -> None:
    with pytest.raises(tspc.OptionError, match="unknown option 'scedule'; did you mean 'schedule'"):
        parse({"scedule": "ring"})


@pytest.mark.parametrize("value", ["rings", {"head": "rings"}])
def test_unknown_schedule(value: object) -> None:
    with pytest.raises(tspc.OptionError, match="schedule='rings'; valid: 'auto', 'ring'"):
        parse({"schedule": value})


def test_bad_value() -> None:
    with pytest.raises(tspc.OptionError, match="layout='zig'; valid: 'auto'"):
        parse({"layout": "zig"})


def test_a_schedule_for_no_region() -> None:
    with pytest.raises(Exception, match="'mlps' matches no region; the regions are blocks.0.att"):
        tspc.plan(LlamaLike(), (TOKENS,), ranks=2, options={"schedule": {"mlps": "ring"}})


def test_schedules_by_glob() -> None:
    chosen = {"*.mlp": "gather", "blocks.0.attention": "stationary"}
    text = str(tspc.plan(LlamaLike(), (TOKENS, TOKENS), ranks=2, options={"schedule": chosen}))
    assert text.count("fold[gather]") == 2 and "fold[stationary]" in text


def test_plan_needs_ranks() -> None:
    with pytest.raises(tspc.PlanError, match="ranks= or mesh="):
        tspc.plan(LlamaLike(), (TOKENS,))


def test_a_plan_for_other_ranks() -> None:
    plan = tspc.plan(LlamaLike(), (TOKENS,), ranks=4)
    with pytest.raises(tspc.PlanError, match="the plan is for 4 ranks, the axis has 1"):
        plan.apply(LlamaLike())


class Unshared(nn.Module):
    """A random op that is no function of positions."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.embedding, self.out, self.op = nn.Embedding(8, 8), nn.Linear(8, 8), op

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.out(self.embedding(tokens))
        if self.op == "rrelu":
            return F.rrelu(y, training=True)
        return torch.multinomial(y.softmax(-1).flatten(0, 1), 1)


@pytest.mark.parametrize("op", ["rrelu", "multinomial"])
def test_a_draw_that_ranks_cannot_share(op: str) -> None:
    with pytest.raises(Exception, match=rf"test_errors.py:\d+: aten.{op}.default draws random"):
        tspc.plan(Unshared(op), (TOKENS,), ranks=2)


def test_explain_before_the_first_call() -> None:
    with pytest.raises(tspc.PlanError, match="call it first"):
        tspc.explain(torch.compile(LlamaLike(), backend="tsp"))


def test_one_rank_is_plain_inductor() -> None:
    """As many graphs, and equal to the last bit."""
    torch.manual_seed(0)
    model, ends = LlamaLike(layers=1), []
    for backend in ("inductor", "tsp"):
        torch._dynamo.reset()
        counters.clear()
        fn = torch.compile(model, backend=backend)
        losses = [fn(TOKENS[:, :n], TOKENS[:, :n]).item() for n in (8, 7, 5)]
        ends.append((losses, counters["stats"]["unique_graphs"]))
    assert ends[0] == ends[1] and ends[0][1] == 2


def doubled(x: torch.Tensor) -> torch.Tensor:
    if x.requires_grad:
        x.register_hook(lambda g: g * 2)
    return x


UNSEEN = {
    "a hook on a gradient": doubled,
    "torch.cond": lambda x: torch.cond(x.sum() > 0, lambda a: a * 2, lambda a: a * 3, (x,)),
    "torch.func's grad": lambda x: torch.func.grad(lambda y: (y**3).sum())(x),
}


class Through(nn.Module):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.embedding, self.out, self.fn = nn.Embedding(8, 8), nn.Linear(8, 8), fn

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.fn(self.embedding(tokens))).square().mean()


@pytest.mark.parametrize("what", UNSEEN)
def test_a_backward_that_is_not_seen(what: str) -> None:
    with pytest.raises(Exception, match=rf"test_errors.py:\d+: {what}"):
        tspc.plan(Through(UNSEEN[what]), (TOKENS,), ranks=2)


class Counting(LlamaLike):
    """Writes into a parameter through a view that it reads after."""

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.norm.weight.view(-1)
        with torch.no_grad():
            weight.mul_(1.0)
        return super().forward(tokens, labels) * weight.sum()


def test_a_view_of_a_parameter_that_is_written() -> None:
    with pytest.raises(Exception, match="norm.weight: a view of it is written and read"):
        tspc.plan(Counting(), (TOKENS,), ranks=2)


class Renormed(nn.Module):
    """An op without a rule on values with the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(32, 16), nn.Linear(16, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return F.softmax(self.out(x.renorm(2, 1, 1.0)), -1).square().sum()


def test_an_op_without_a_rule_runs_replicated() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 32, (2, 9))
    found = tspc.verify(Renormed().double(), (tokens,), ranks=3, tolerance=1e-9)
    assert "aten.renorm" in str(found.graphs[0].rewritten.analysis.fallbacks)


def test_verify_tells_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    import tspc.runtime.fold.schedules as schedules

    real = schedules._results

    def wrong(body, sums, stacks):
        outs, saved = real(body, sums, stacks)
        return [outs[0] * 1.01, *outs[1:]], saved

    monkeypatch.setattr(schedules, "_results", wrong)
    with pytest.raises(tspc.ParityError, match="gradient of blocks.0.mlp.gate.weight"):
        tspc.verify(LlamaLike(), (TOKENS, TOKENS), ranks=2, options={"schedule": "gather"})


def test_a_backend_of_simulated_ranks_is_a_backend() -> None:
    fn = torch.compile(LlamaLike(layers=1), backend=simulated_backend(2))
    assert fn(TOKENS).shape == (2, 8, 256)
