"""The analysis is linear in the number of layers: counted, not timed."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from tests.house.mutants import applying
from tspc.factors.notation import Op, Rule
from tspc.frontend.from_fx import convert
from tspc.ir.program import INPUT, PARAM, Program, Ref
from tspc.passes.analyse.factorize import factorize
from tspc.passes.lower.choose import choose
from tspc.passes.rewrite.normalize import normalize

WIDTH, HEADS, FFN, LENGTH = 12, 3, 20, 7
SHAPES = ((WIDTH,), (3 * WIDTH, WIDTH), (WIDTH, WIDTH), (FFN, WIDTH), (WIDTH, FFN))


def layer(x: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
    norm, qkv, out, up, down = weights
    q, k, v = F.linear(F.rms_norm(x, (WIDTH,), norm), qkv).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + F.linear(y.transpose(1, 2).flatten(2), out)
    return x + F.linear(F.gelu(F.linear(F.rms_norm(x, (WIDTH,), norm), up)), down)


def program_of(layers: int) -> Program:
    """One traced layer, laid end to end."""
    weights = [torch.randn(s) for s in SHAPES]
    gm = make_fx(lambda x, *given: layer(x, given), pre_dispatch=True)(
        torch.randn(2, LENGTH, WIDTH), *weights
    )
    kinds = [(INPUT, "x"), *((PARAM, f"w{i}") for i in range(len(weights)))]
    one = convert("chain", gm, kinds, [True] * len(kinds), {})[0]
    x, nodes, last = one.nodes[0], [one.nodes[0]], Ref("x")
    for i in range(layers):

        def renamed(r: Ref, i: int = i, before: Ref = last) -> Ref:
            return before if r.name == x.name else replace(r, name=f"{r.name}.{i}")

        nodes += [replace(n, name=f"{n.name}.{i}").map_refs(renamed) for n in one.nodes[1:-1]]
        last = renamed(one.output.args[0])
    return Program("chain", (*nodes, replace(one.output, args=(last,))))


def counted(layers: int) -> Counter[str]:
    """Rules applied, and calls of Python functions in the analysis and the choice of regions."""
    program, counts = normalize(program_of(layers)), Counter[str]()

    def note(r: Rule, op: Op) -> Rule:
        counts["rules"] += 1
        return r

    def called(frame: Any, event: str, _: Any) -> None:
        counts["calls"] += event == "call"

    with applying(note):
        sys.setprofile(called)
        try:
            chosen = choose(factorize(program), 4)
        finally:
            sys.setprofile(None)
    assert len(chosen.regions) == 2 * layers and not chosen.refused
    return counts


def test_rules_are_applied_once_per_op() -> None:
    few, many = counted(8), counted(128)
    assert many["rules"] == 16 * few["rules"] and many["rules"] > 128 * 8
    assert many["calls"] <= 16.5 * few["calls"]
