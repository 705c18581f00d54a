"""The cost model: its closed forms, the published crossover, and what "auto" picks of them."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn as nn

import tspc
from examples.llama_like import LlamaLike
from tspc.base.hardware import HARDWARE, Hardware, hardware
from tspc.cost.model import STATIONARY, backward, fastest, folded, forward, sizes, transient
from tspc.ir.body import Body

RANKS, BATCH = 4, 2


def bodies(model: nn.Module, length: int, options: dict | None = None) -> list[Body]:
    tokens = torch.zeros(BATCH, length, dtype=torch.long)
    plan = tspc.plan(model, (tokens,), ranks=RANKS, options=options)
    return list(plan.rewritten.bodies.values())


def symbolic(body: Body) -> tuple[dict, sympy.Symbol]:
    """The program's symbols with the batch filled in; the sequence stays one."""
    (length,) = body.extents[0].length.free_symbols
    return {s: s if s == length else BATCH for s in body.symbols}, length


@pytest.mark.parametrize("hidden", [64, 256])
def test_the_published_crossover_is_derived(hidden: int) -> None:
    """arXiv:2604.26294: TSP moves fewer elements than TP from B S = 8 h, for MHA and F = 4."""
    gated = LlamaLike(256, hidden, 1, 4, 4, 4 * hidden)
    attention = next(b for b in bodies(gated, 64) if b.attentions)
    mlp = next(b for b in bodies(gated, 64) if "mlp" in b.name)
    total = 0
    for body in (attention, mlp):
        symbols, length = symbolic(body)
        z = sizes(body, symbols, length)
        stay = forward(z, STATIONARY, RANKS).elements
        total += stay - forward(z, folded(body), RANKS).elements
    (crossover,) = sympy.solve(total, length)
    assert crossover * BATCH == 8 * hidden


def test_closed_forms_of_a_step() -> None:
    """Forward and backward with recompute: ring 3w, broadcast 3w + 3k, stationary 5n."""
    hidden = 64
    f = sympy.Rational(RANKS - 1, RANKS)
    for body in bodies(LlamaLike(256, hidden, 1, 8, 4, 160), 64)[:2]:
        symbols, length = symbolic(body)
        z = sizes(body, symbols, length)
        n, keys = BATCH * length * hidden, 2 * BATCH * length * hidden // 2
        w = body.weight_elements * RANKS
        ways = {
            k: sympy.expand(forward(z, k, RANKS).elements + backward(z, k, RANKS).elements)
            for k in (folded(body), "gather", STATIONARY)
        }
        assert ways[STATIONARY] == 5 * f * n
        if body.attentions:
            assert ways["broadcast"] == ways["gather"] == sympy.expand(3 * f * w + 3 * f * keys)
        else:
            assert ways["ring"] == 2 * f * w + w and ways["gather"] == 3 * f * w
        assert sympy.expand(z.flops).has(length)


def test_auto_changes_over_with_the_length() -> None:
    slow = {"flops": 1e14, "bandwidth": 1e9, "latency": 0.0, "overlap": 1.0}
    picked = {}
    for length in (8, 65536):
        for body in bodies(LlamaLike(256, 64, 1, 4, 2), length, {"hardware": slow}):
            values = tuple(
                length if s in body.extents[0].length.free_symbols else BATCH for s in body.symbols
            )
            picked[length, folded(body)] = fastest(body, values, length)
    assert picked == {
        (8, "broadcast"): "stationary",
        (8, "ring"): "stationary",
        (65536, "broadcast"): "broadcast",
        (65536, "ring"): "ring",
    }


def test_memory_of_a_fold_falls_with_the_ranks() -> None:
    body = bodies(LlamaLike(256, 64, 1, 4, 4), 64)[1]
    symbols = {s: 64 if s in body.extents[0].length.free_symbols else BATCH for s in body.symbols}
    z = sizes(body, symbols, 64)
    assert transient(z, "ring", 8) < transient(z, "ring", 4) < transient(z, "gather", 4)


def test_a_table_of_hardware() -> None:
    assert hardware(None, "NVIDIA H100 80GB HBM3") == HARDWARE["h100"]
    assert hardware("mi300x", "cpu") == HARDWARE["mi300x"]
    assert hardware(None, "cpu") == HARDWARE["cpu"]
    given = {"flops": 1, "bandwidth": 2, "latency": 3, "overlap": 1}
    assert hardware(given, "cpu") == Hardware(1.0, 2.0, 3.0, 1.0)
    with pytest.raises(tspc.OptionError, match="hardware='h10'; valid: cpu, a100"):
        hardware("h10", "cpu")
    with pytest.raises(tspc.OptionError, match="a table has bandwidth, flops, latency, overlap"):
        hardware({"flops": 1}, "cpu")
