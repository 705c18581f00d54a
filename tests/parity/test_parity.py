"""Exactness on simulated ranks: loss, outputs, every gradient and optimizer steps equal one
device's, pairwise over all that varies."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import tspc
from tests.support.models import VOCABULARY, call, make, strided
from tests.support.widen import Widen
from tspc.backend.simulated import Simulated, relative_errors, simulated_backend
from tspc.base.options import parse
from tspc.runtime.fold.schedules import choose

TOLERANCE = 1e-9
VALUES = {
    "model": ("llama_like", "llama_like_mha", "gpt2_like", "hf_llama", "hf_qwen3"),
    "ranks": (1, 2, 3, 4, 8),
    "schedule": ("auto", "ring", "broadcast", "gather", "stationary"),
    "sequence": ("divisible", "odd", "short"),
    "batch": (1, 3),
    "heads": ("divide", "rest"),
    "loss": (True, False),
}


@dataclass(frozen=True)
class Case:
    model: str
    ranks: int
    schedule: str
    sequence: str
    batch: int
    heads: str
    loss: bool

    def __str__(self) -> str:
        where = "inside" if self.loss else "outside"
        parts = (self.schedule, self.sequence, f"B{self.batch}", self.heads, where)
        return "-".join([self.model, f"D{self.ranks}", *parts])

    @property
    def length(self) -> int:
        if self.sequence == "short":
            return 2
        return 4 * self.ranks if self.sequence == "divisible" else 4 * self.ranks + 3

    @property
    def counts(self) -> tuple[int, int]:
        """(heads, K/V heads)."""
        if self.heads == "rest":
            kv, group = {2: (3, 2), 3: (4, 1), 4: (3, 2), 8: (3, 2)}[self.ranks]
        else:
            kv, group = max(self.ranks, 2), 2 if self.ranks < 8 else 1
        heads = kv * group
        mha = self.model in ("llama_like_mha", "gpt2_like")
        return heads, heads if mha else kv


def exists(pair: dict[str, object]) -> bool:
    """Heads that do not divide need 2 ranks, a sequence shorter than D 3."""
    ranks = pair.get("ranks")
    if ranks == 1 and pair.get("heads") == "rest":
        return False
    return not (ranks in (1, 2) and pair.get("sequence") == "short")


def pairs() -> set[frozenset[tuple[str, object]]]:
    out = set()
    for (a, xs), (b, ys) in itertools.combinations(VALUES.items(), 2):
        for x, y in itertools.product(xs, ys):
            if exists({a: x, b: y}):
                out.add(frozenset({(a, x), (b, y)}))
    return out


def pairs_of(case: Case) -> set[frozenset[tuple[str, object]]]:
    named = [(k, getattr(case, k)) for k in VALUES]
    return {frozenset(p) for p in itertools.combinations(named, 2)}


def cover() -> list[Case]:
    """Greedy pairwise cover, the same every time."""
    every = [
        Case(*values)
        for values in itertools.product(*VALUES.values())
        if exists(dict(zip(VALUES, values)))
    ]
    left, out = pairs(), []
    while left:
        best = max(every, key=lambda c: len(pairs_of(c) & left))
        out.append(best)
        left -= pairs_of(best)
    return out


CASES = cover()


def test_cases_cover_every_pair() -> None:
    covered = set().union(*map(pairs_of, CASES))
    assert pairs() <= covered
    assert all(exists({k: getattr(c, k) for k in VALUES}) for c in CASES)


def regions_of(case: Case) -> set[str]:
    """The last parts of the expected region names, per layer and for the head."""
    if case.model == "gpt2_like":
        return {"attention", "0", "1", "tokens"}
    attention = "self_attn" if case.model.startswith("hf_") else "attention"
    return {attention, "mlp", "lm_head" if case.model.startswith("hf_") else "head"}


def check_decisions(case: Case, graph: Simulated) -> None:
    rewritten = graph.rewritten
    assert {n.rsplit(".", 1)[-1] for n, _, _ in rewritten.choice.regions} == regions_of(case)
    assert len(rewritten.choice.regions) == 5
    assert not rewritten.choice.refused
    assert not rewritten.typed.fallbacks and not rewritten.analysis.fallbacks
    sizes = [graph.sizes[s] for s in rewritten.symbols]
    for n in rewritten.folds:
        units = n.kwargs["fold"].size
        name = n.kwargs["fold"].name
        body = rewritten.bodies[name]
        if name.endswith(("attention", "self_attn")):
            assert units == case.counts[1] and len(body.attentions) == 1
        else:
            assert not body.attentions
        got = choose(body, case.ranks, sizes, graph.rows())
        if case.schedule == "ring":
            assert got == ("broadcast" if body.attentions else "ring")
        elif case.schedule != "auto":
            assert got == case.schedule


def train(
    model: torch.nn.Module, ranks: int, fn: object, kwargs: dict, make_one: Callable[..., Any]
) -> None:
    """Three steps, each rank's optimizer on its own chunks, clipped by the norm over all."""
    parameters = list(model.parameters())
    chunks = [
        [torch.nn.Parameter(c.clone()) for c in p.detach().reshape(-1).tensor_split(ranks)]
        for p in parameters
    ]
    optimizers = [make_one([c[r] for c in chunks], lr=1e-2) for r in range(ranks)]
    for _ in range(3):
        model.zero_grad()
        out = fn(**kwargs)  # type: ignore[operator]
        loss_of(out, kwargs).backward()
        norm = sum(float(p.grad.norm()) ** 2 for p in parameters if p.grad is not None) ** 0.5
        for p, c in zip(parameters, chunks):
            assert p.grad is not None
            for part, g in zip(c, p.grad.reshape(-1).tensor_split(ranks)):
                part.grad = g * min(1.0, 0.5 / norm)
        for o in optimizers:
            o.step()
        with torch.no_grad():
            for p, c in zip(parameters, chunks):
                p.copy_(torch.cat([x.detach() for x in c]).view(p.shape))


def loss_of(out: object, kwargs: dict) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        logits = out
    else:
        logits = out.loss if "labels" in kwargs else out.logits  # type: ignore[attr-defined]
    if not logits.dim():
        return logits
    targets = torch.roll(next(iter(kwargs.values())), -1, 1)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


FEW = [  # of the inner loop
    pytest.param(case, marks=[] if i % 8 == 0 else [pytest.mark.slow], id=str(case))
    for i, case in enumerate(CASES)
]


def check_steps(case: Case, model: torch.nn.Module, compiled: object, kwargs: dict) -> None:
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    # two tokens: gradients of q and k so small that Adam magnifies their rounding by 1 / eps
    eps = 1e-5 if case.sequence == "short" and case.batch == 1 else 1e-8
    for make_one in (torch.optim.SGD, partial(torch.optim.AdamW, eps=eps)):
        ends = []
        for fn, ranks in ((model, 1), (compiled, case.ranks)):
            model.load_state_dict(start, strict=False)
            train(model, ranks, fn, kwargs, make_one)
            ends.append({n: p.detach() - start[n] for n, p in model.named_parameters()})
            model.load_state_dict(start, strict=False)
        errors = relative_errors(ends[1], ends[0])
        assert max(errors.values()) <= TOLERANCE, errors


def built(case: Case) -> tuple[torch.nn.Module, dict]:
    """The model, and what a call of it is given."""
    name = case.model.removesuffix("_mha")
    model = make(name, *case.counts)
    tokens = torch.randint(0, VOCABULARY, (case.batch, case.length))
    return model, call(name, tokens, case.loss)


@pytest.mark.parametrize("case", FEW)
def test_equals_one_device(case: Case) -> None:
    model, kwargs = built(case)
    with Widen():
        given = {n: strided(x) if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
        found = tspc.verify(model, (), given, case.ranks, {"schedule": case.schedule}, TOLERANCE)
        assert len(found.graphs) == 1
        check_decisions(case, found.graphs[0])


STEPPED = [  # the steps of the others are the rest of a full run
    pytest.param(case, marks=pytest.mark.slow if i % 5 == 0 else pytest.mark.wide, id=str(case))
    for i, case in enumerate(CASES)
]


@pytest.mark.parametrize("case", STEPPED)
def test_steps_equal_one_devices(case: Case) -> None:
    model, kwargs = built(case)
    backend = simulated_backend(case.ranks, parse({"schedule": case.schedule}))
    with Widen():
        check_steps(case, model, torch.compile(model, backend=backend), kwargs)
