"""An op of the user's with a rule of the user's: trained folded and cut, and its rule tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

import tspc
from tests.support.models import whole
from tspc.backend import brute
from tspc.base.errors import RuleError
from tspc.factors.registry import RULES

RULE = "... f, f, o f -> ... o"
TOLERANCE = 1e-10


@torch.library.custom_op("users::gated", mutates_args=())
def gated(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """x [..., F] * scale [F], then the product with weight [O, F]."""
    return (x.sigmoid() * x * scale) @ weight.T


@gated.register_fake
def _(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, scale, weight = ctx.saved_tensors
    s, dh = x.sigmoid(), g @ weight
    h = s * x * scale
    dx = dh * scale * s * (1 + x * (1 - s))
    dscale = (dh * s * x).flatten(0, -2).sum(0)
    return dx, dscale, g.flatten(0, -2).T @ h.flatten(0, -2)


gated.register_autograd(_backward, setup_context=_keep)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.up = nn.Embedding(41, 12), nn.Linear(12, 40)
        self.scale, self.down = nn.Parameter(torch.ones(40)), nn.Parameter(torch.randn(12, 40) / 6)
        self.head = nn.Linear(12, 41)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + gated(self.up(x), self.scale, self.down)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def trained(compiled: bool) -> dict[str, Any]:
    """Losses, gradients of the last step and weights after three."""
    torch.manual_seed(0)
    model = Gated().double()
    fn = torch.compile(model, backend="tsp", options={"compiler": "eager"}) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = fn(torch.randint(0, 41, (2, 11), generator=generator))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = {f"{n}.grad": p.grad for n, p in model.named_parameters()}
    found |= {n: p.detach() for n, p in model.named_parameters()}
    return {"losses": losses, **{n: whole(x) for n, x in found.items()}}


def on_ranks() -> tuple[dict[str, Any], list[int], list[str]]:
    """What is trained; the elements of the op's weight on this rank; regions that hold the op."""
    tspc.rule(gated, RULE, reduce="f")
    try:
        found = trained(True)
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Gated().double()
        ids = torch.zeros(2, 11, dtype=torch.int64)
        torch.compile(model, backend="tsp", options={"compiler": "eager"})(ids)
        plan = tspc.plan(Gated().double(), (ids,), ranks=dist.get_world_size())
        folds = [n.kwargs["fold"] for n in plan.rewritten.folds]
        holding = [f.name for f in folds if any("gated" in str(n.op) for n in f.body)]
        return found, [model.down.to_local().numel()], holding  # type: ignore[operator]
    finally:
        del RULES[torch.ops.users.gated.default]


@pytest.mark.dist
def test_an_op_of_the_user_s_trains_folded_and_cut(world: Any) -> None:
    one = trained(False)
    for found, elements, holding in world(2).run(on_ranks):
        assert holding and elements == [12 * 20]
        assert found["losses"] == pytest.approx(one["losses"], rel=TOLERANCE)
        for n in one.keys() - {"losses"}:
            error = (found[n] - one[n]).abs().max() / one[n].abs().max().clamp(min=1e-30)
            assert error <= TOLERANCE, (n, error)


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def sample() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(s, dtype=torch.float64) for s in ((2, 5, 6), (6,), (4, 6)))


def test_a_right_rule_is_tried_along_every_factor(registered: None) -> None:
    tspc.rule(gated, RULE, reduce="f")
    assert tspc.check_rule(gated, [sample()]) == 4  # two leading dims, f, o


@pytest.mark.parametrize(
    "text,roles,message",
    [
        ("... f, f, o f -> ... f", {"reduce": "o"}, "gated"),  # the result is of o
        ("... f, g, o g -> ... o", {"reduce": "f g"}, "cut along"),
        ("... f, f, o f -> ... o", {"lse": "f"}, "cut along"),
    ],
)
def test_a_wrong_rule_is_caught(
    registered: None, text: str, roles: dict[str, str], message: str
) -> None:
    tspc.rule(gated, text, **roles)
    with pytest.raises(RuleError, match=message):
        tspc.check_rule(gated, [sample()])


def test_samples_that_try_nothing_are_an_error(registered: None) -> None:
    with pytest.raises(RuleError, match="no sample of users.gated.* reaches a cut"):
        tspc.check_rule(gated, [sample()])
    tspc.rule(gated, RULE, reduce="f")
    with pytest.raises(RuleError, match="no sample"):
        tspc.check_rule(gated, [])


@pytest.mark.parametrize(
    "op,text,message",
    [
        ("gated", RULE, "takes an op of torch.ops or a torch.library.custom_op, not 'gated'"),
        (torch.ops.aten.add, "..., ... -> ...", "has the overloads .*: give one of them"),
        (gated, "... f, f, o f", "with one arrow"),
        (gated, "f, f, f, f -> f", "has 4 operands, users::gated"),
        (gated, "... f, f, o f -> ... o, o", "has 2 results, users::gated"),
        (torch.ops.aten.relu, "... -> ...", "two rules for aten.relu.default|give one of them"),
    ],
)
def test_what_is_no_rule_is_told(registered: None, op: Any, text: str, message: str) -> None:
    roles = {"reduce": "f"} if "o f ->" in text else {}
    with pytest.raises(RuleError, match=message):
        tspc.rule(op, text, **roles)


def test_one_position_alone() -> None:
    x = torch.arange(6.0).view(2, 3)
    got = brute.only(x, 1, 2)
    assert got.shape == x.shape and got[:, 2].tolist() == [2, 5] and got[:, :2].abs().sum() == 0


def test_pieces_of_a_factor() -> None:
    from tspc.factors.factor import Factors

    parts = brute.pieces(Factors().new(4))
    assert sorted(i for p in parts for i in p) == [0, 1, 2, 3] and len(parts) > 1
