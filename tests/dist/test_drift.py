"""Ranks that drift apart: other data, another number of steps or of cleared gradients ends all of
them at the next call; what is the same on all ranks never does."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from tests.support.models import VOCABULARY, tokens_of
from tspc.base.errors import RankMismatchError
from tspc.runtime.call import drift, inputs
from tspc.runtime.call.digest import BLOCK, digest, digest_there

EAGER = {"compiler": "eager"}


def _train(do: Callable[..., Any], steps: int = 6, plain: bool = False) -> str:
    """What a loop raises, and at which step. do(step, rank, model, optimizer, fn): one step."""
    torch.manual_seed(0)
    model = Floats() if plain else Words()
    fn = torch.compile(model, backend="tsp", options=EAGER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        try:
            do(step, dist.get_rank(), model, optimizer, fn)
        except RankMismatchError as e:
            return f"{step}: {e}"
    return ""


def _step(optimizer: Any, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


class Words(nn.Module):
    """model(ids [B, S], labels) -> a loss; without labels log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        y = self.head(torch.tanh(self.words(ids)))
        return y if labels is None else F.cross_entropy(y.flatten(0, 1), labels.flatten())


class Floats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        if cache is not None:
            cache.add_(x)
        return self.down(torch.tanh(self.up(x))).square().mean()


def skipped_batch(step: int, rank: int, model: Any, optimizer: Any, fn: Any) -> None:
    batch = step + 1 if rank == 1 and step >= 2 else step
    _step(optimizer, fn(tokens_of(8, seed=batch), tokens_of(8, seed=batch)))


def other_ids_from_the_fourth_call(
    step: int, rank: int, model: Any, optimizer: Any, fn: Any
) -> None:
    tokens = tokens_of(8)
    tokens[1, 7] += step >= 4 and rank == 1
    _step(optimizer, fn(tokens, tokens_of(8)))


def no_step(step: int, rank: int, model: Any, optimizer: Any, fn: Any) -> None:
    fn(tokens_of(8), tokens_of(8)).backward()
    if rank == 0 or step != 2:
        optimizer.step()
    optimizer.zero_grad()


def no_step_by_hand(step: int, rank: int, model: Any, optimizer: Any, fn: Any) -> None:
    fn(tokens_of(8), tokens_of(8)).backward()
    with torch.no_grad():
        for p in model.parameters():
            if rank == 0 or step != 2:
                p.add_(p.grad, alpha=-0.1)
            p.grad = None


def no_zero_grad(step: int, rank: int, model: Any, optimizer: Any, fn: Any) -> None:
    fn(tokens_of(8), tokens_of(8)).backward()
    optimizer.step()
    if rank == 0 or step != 2:
        optimizer.zero_grad()


def no_zero_grad_in_place(step: int, rank: int, model: Any, optimizer: Any, fn: Any) -> None:
    fn(tokens_of(8), tokens_of(8)).backward()
    optimizer.step()
    if rank == 0 or step != 2:
        optimizer.zero_grad(set_to_none=False)


def other_floats(step: int, rank: int, model: Any, optimizer: Any, fn: Any) -> None:
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(step))
    x[1, 7, 15] *= -1 if rank == 1 and step == 2 else 1
    _step(optimizer, fn(x))


def a_cache_that_overlaps(step: int, rank: int, model: Any, optimizer: Any, fn: Any) -> None:
    rows = torch.ones(2, 9, 16)
    fn(rows[:, 1:], rows[:, :-1] if rank == 1 else torch.ones(2, 8, 16))


def another_mode(step: int, rank: int, model: Any, optimizer: Any, fn: Any) -> None:
    with torch.set_grad_enabled(step != 1 and (step != 2 or rank == 0)):
        fn(torch.ones(2, 8, 16))


DRIFTS = {
    skipped_batch: (2, "was given other values in ids: .*, labels: .*one sampler seed"),
    other_ids_from_the_fourth_call: (4, "was given other values in ids: .*one sampler seed"),
    no_step: (3, "has made optimizer steps: 3, .*; rank 1 has made optimizer steps: 2, .*alike"),
    no_step_by_hand: (
        3,
        "has made changes in place of .*: 3, .*; rank 1 has made changes in .*: 2",
    ),
    no_zero_grad: (3, "holds as gradient of .*: none, .*; rank 1 holds as gradient of .*: one"),
    no_zero_grad_in_place: (3, "holds as gradient of .*in place . times.*; rank 1 holds as"),
    other_floats: (2, "was given other values in x: "),
    a_cache_that_overlaps: (0, "memory of its inputs: apart; rank 1 .*shares memory with x"),
    another_mode: (2, "rank 0 was called with grad mode: enabled; rank 1 .* grad mode: disabled"),
}


def drifts() -> dict[str, str]:
    out = {}
    for do in DRIFTS:
        torch._dynamo.reset()
        out[do.__name__] = _train(
            do, plain=do in (other_floats, a_cache_that_overlaps, another_mode)
        )
    return out


@pytest.mark.dist
def test_ranks_that_drift_are_told_at_the_next_call(world: Any) -> None:
    for told in world(2).run(drifts):
        for do, (step, pattern) in DRIFTS.items():
            text = told[do.__name__]
            whole = rf"^{step}: ranks \[1\] of axis .* differ from rank 0: .*{pattern}"
            assert re.search(whole, text), (do.__name__, text)


def alike() -> list[str]:
    """Accumulation, clipping, evaluation, an average of the weights, a state that is loaded again,
    gradients that are zeroed in place, other lengths: no rank differs."""

    def do(step: int, rank: int, model: Any, optimizer: Any, fn: Any) -> None:
        for micro in range(2):
            fn(tokens_of(8 + step % 2, seed=micro), tokens_of(8 + step % 2, seed=micro)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        mean = copy.deepcopy(model)
        with torch.no_grad():
            for p, q in zip(mean.parameters(), model.parameters()):
                p.mul_(0.9).add_(q, alpha=0.1)
            fn(tokens_of(8))
            torch.compile(mean, backend="tsp", options=EAGER)(tokens_of(8))
        if step == 2:
            model.load_state_dict(mean.state_dict())
        if rank == 0:
            [p.detach().clone() for p in model.parameters()]

    return [_train(do, 4)]


def late() -> tuple[str, str]:
    """Contents compared where they lie: told before the optimizer steps."""
    stepped = []

    def do(step: int, rank: int, model: Any, optimizer: Any, fn: Any) -> None:
        tokens = tokens_of(8)
        tokens[0, 0] += step == 1 and rank == 1
        fn(tokens, tokens_of(8)).backward()
        optimizer.step()
        stepped.append(step)

    with mock.patch.object(inputs, "_is_late", lambda x: True):
        told = _train(do, 3)
    return told, str(stepped)


@pytest.mark.dist
def test_what_is_the_same_is_no_drift_and_what_comes_late_is_told_before_a_step(world: Any) -> None:
    w = world(2)
    assert w.run(alike) == [[""], [""]]
    for told, stepped in w.run(late):
        assert re.search(r"^1: the ranks of axis .* were given other values in ids. Do", told)
        assert stepped == "[0]"


@pytest.mark.parametrize("of", [digest, lambda x: int(digest_there(x))], ids=["cpu", "there"])
def test_a_digest_sees_every_change(of: Callable[[torch.Tensor], int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * BLOCK + 3, generator=generator, dtype=torch.float64)
    small = torch.randint(0, 9, (3, 7), generator=generator)
    every = [x, -x, x.flip(0), x + 0.0, x[1:], small, small.T, -small, ~small, small.bool()]
    swapped, other = x.clone(), x.clone()
    swapped[[5, BLOCK + 5]] = x[[BLOCK + 5, 5]]
    other[-1] += 1e-12
    every += [swapped, other, x.float(), x.bfloat16(), x.bfloat16()[1:], torch.zeros(0)]
    found = [of(t) for t in every]
    assert found[3] == found[0] and of(x.clone()) == found[0]
    assert len(set(found)) == len(found) - 1
    assert of(small.T) == of(small.T.contiguous())
    assert all(-(1 << 63) <= n < 1 << 63 for n in found)


def test_parameters_are_forgotten_with_their_model() -> None:
    p = nn.Parameter(torch.zeros(2))
    before = len(drift._FIRST)
    drift.Taken().since([p])
    assert len(drift._FIRST) == before + 1
    del p
    assert len(drift._FIRST) == before
