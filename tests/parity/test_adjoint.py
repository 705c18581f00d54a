"""The backward of every fold is the adjoint of its forward: <J v, w> = <v, J^T w> for random
directions v of tokens and weights and random cotangents w.

J v by forward-mode differentiation on one device with torch's plain attention, J^T w by the folds'
backward on simulated ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tspc.backend.simulated import Simulated, simulated_backend
from tspc.base.options import parse
from tspc.ir.body import Body
from tspc.runtime.fold import schedules

pytestmark = pytest.mark.slow

BATCH, LENGTH, HIDDEN, VOCABULARY = 2, 7, 12, 23
Tensors = dict[str, Tensor]


class Attention(nn.Module):
    """heads, of which kv are of keys and values; fused: one weight makes all three; normed: q and k
    of each head have a norm."""

    def __init__(
        self, heads: int, kv: int, bias: bool, fused: bool, normed: bool, causal: bool
    ) -> None:
        super().__init__()
        self.width, self.causal, self.normed = 4, causal, normed
        self.sizes = [heads * 4, kv * 4, kv * 4]
        sizes = [sum(self.sizes)] if fused else self.sizes
        self.into = nn.ModuleList(nn.Linear(HIDDEN, n, bias) for n in sizes)
        self.out = nn.Linear(heads * 4, HIDDEN, bias)

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) if self.normed else x

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        made = [w(x) for w in self.into]
        parts = made if len(made) == 3 else made[0].split(self.sizes, -1)
        q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(
            self.norm(q), self.norm(k), v, is_causal=self.causal, enable_gqa=q.shape[1] > k.shape[1]
        )
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, ffn: int, bias: bool, gated: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, ffn, bias), nn.Linear(ffn, HIDDEN, bias)
        self.gate = nn.Linear(HIDDEN, ffn, bias) if gated else None

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Head(nn.Module):
    """The language model's head with its loss."""

    def __init__(self, bias: bool, smoothing: float) -> None:
        super().__init__()
        self.head, self.smoothing = nn.Linear(HIDDEN, VOCABULARY, bias), smoothing

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(x).flatten(0, 1)
        return F.cross_entropy(logits, labels.flatten(), label_smoothing=self.smoothing)


REGIONS: dict[str, Callable[[], nn.Module]] = {
    "gqa": lambda: Attention(4, 2, False, False, False, True),
    "mqa": lambda: Attention(4, 1, False, False, True, True),
    "mha": lambda: Attention(3, 3, False, False, False, False),
    "gqa_normed": lambda: Attention(12, 6, True, False, True, False),
    "fused": lambda: Attention(4, 4, True, True, False, True),
    "fused_groups": lambda: Attention(6, 3, False, True, False, True),
    "gated": lambda: MLP(12, False, True),
    "gated_rest": lambda: MLP(10, True, True),
    "mlp": lambda: MLP(11, True, False),
    "head": lambda: Head(False, 0.0),
    "smoothed": lambda: Head(True, 0.1),
}


class Side(nn.Module):
    """All regions side by side, each with tokens of its own: x is [regions, B, S, h]."""

    def __init__(self) -> None:
        super().__init__()
        self.regions = nn.ModuleDict({n: make() for n, make in REGIONS.items()})

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {n: m(x[i], labels) for i, (n, m) in enumerate(self.regions.items())}


@cache
def one_device() -> tuple[Side, Tensors, Tensor, Tensors, Tensors]:
    """The model, what it is differentiated in and the labels; directions, and J applied to them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    torch.manual_seed(0)
    model = Side().double()
    given = {"x": draw(len(REGIONS), BATCH, LENGTH, HIDDEN), **dict(model.named_parameters())}
    given = {n: t.detach() for n, t in given.items()}
    directions = {n: draw(*t.shape) for n, t in given.items()}
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)

    def run(given: Tensors) -> Tensors:
        weights = {n: t for n, t in given.items() if n != "x"}
        return torch.func.functional_call(model, weights, (given["x"], labels))

    with sdpa_kernel(SDPBackend.MATH):
        _, moved = torch.func.jvp(run, (given,), (directions,))
    return model, given, labels, directions, moved


@pytest.mark.parametrize("policy", ["min", "max-speed"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_adjoint(ranks: int, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every schedule of one compile: the schedule is chosen at a call."""
    model, given, labels, directions, moved = one_device()
    made: list[Simulated] = []
    options = {"memory_budget": policy, "outputs": "full"}
    torch._dynamo.reset()
    fn = torch.compile(model, backend=simulated_backend(ranks, parse(options), made))
    choose, chosen = schedules.choose, set[str]()
    for schedule in ("ring", "broadcast", "gather", "stationary"):

        def fixed(body: Body, *sizes: Any, schedule: str = schedule) -> str:
            chosen.add(got := choose(replace(body, schedule=schedule), *sizes))
            return got

        chosen.clear()
        monkeypatch.setattr(schedules, "choose", fixed)
        x = given["x"].clone().requires_grad_()
        outs = fn(x, labels)
        torch.manual_seed(1)
        cotangents = {n: torch.randn_like(t) for n, t in outs.items()}
        model.zero_grad()
        torch.autograd.backward(list(outs.values()), list(cotangents.values()))
        assert x.grad is not None
        for i, n in enumerate(REGIONS):
            forward = float((moved[n] * cotangents[n]).sum())
            back = float((directions["x"][i] * x.grad[i]).sum())
            for name, p in model.regions[n].named_parameters():
                assert p.grad is not None
                back += float((directions[f"regions.{n}.{name}"] * p.grad).sum())
            assert back == pytest.approx(forward, rel=1e-9), (schedule, n)
        assert schedule in chosen
    (graph,) = made
    folds = graph.rewritten.bodies
    assert {n.split(".")[1] for n in folds} == set(REGIONS) and len(folds) == len(REGIONS)
    for body in folds.values():
        assert any(p.saves for p in body.pieces) == (policy == "max-speed")
