"""Lengths do not recompile: neither Dynamo nor Inductor, on both sides of a schedule's
crossover."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch._inductor import compile_fx

from tests.support.models import call, loss_of, make, tokens_of
from tspc.backend.tsp import tsp
from tspc.runtime.fold import schedules

pytestmark = pytest.mark.dist
# bytes alone decide: a crossover between 31 and 300 for every region
LINK = {"flops": 1e14, "bandwidth": 1e9, "latency": 0.0, "overlap": 0.0}
LENGTHS = [16, 9, 2, 3, 300, 31, 5, 400, 12, 7, 48, 333]


def compiles(model: str, lengths: list[int]) -> tuple[list[tuple[int, int]], list[set[str]]]:
    """After each length: graphs given to the backend and graphs lowered by Inductor, and the
    schedules of the call."""
    m = make(model, layers=1).float()
    graphs, lowered, chosen = [], [], []
    lower, choose = compile_fx._compile_fx_inner, schedules.choose

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return tsp(gm, inputs, options={"hardware": LINK})

    def counting(*args: Any, **kwargs: Any) -> Any:
        lowered.append(args)
        return lower(*args, **kwargs)

    def choosing(*args: Any) -> str:
        chosen[-1].add(choose(*args))
        return choose(*args)

    fn, counts = torch.compile(m, backend=backend), []
    with (
        mock.patch.object(compile_fx, "_compile_fx_inner", counting),
        mock.patch.object(schedules, "choose", choosing),
    ):
        for length in lengths:
            chosen.append(set())
            loss_of(fn(**call(model, tokens_of(length), True))).backward()
            counts.append((len(graphs), len(lowered)))
    return counts, chosen


@pytest.mark.wide
def test_twelve_lengths_compile_twice(world: Any) -> None:
    for counts, chosen in world(2).run(compiles, model="hf_llama", lengths=LENGTHS):
        graphs, lowered = counts[1]
        assert graphs <= 3 and lowered >= 8  # whole, sharded, with a symbolic length
        assert counts[2:] == [(graphs, lowered)] * 10
        later = chosen[2:]
        assert {"stationary"} in later and {"broadcast", "ring"} in later, later
