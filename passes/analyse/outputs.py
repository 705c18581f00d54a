"""Hand out a range of the sequence by cutting the whole value after the program has run.

In: the analysis of a program. Out: the program with the whole value as its output, and the ranges
to cut from it. A K/V cache of a sliding window then neither opens its region nor is gathered
before somebody reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import sympy
import torch

from tspc.base.context import Arguments
from tspc.factors.factor import Factor
from tspc.ir.body import evaluate
from tspc.ir.program import Node, Program, Ref, Size
from tspc.passes.analyse.factorize import Analysis

SLICE = torch.ops.aten.slice.Tensor


@dataclass(frozen=True)
class Range:
    """x[..., start:end:step, ...] of a dim; shape: what is left of x, over the symbols."""

    dim: int
    start: Size
    end: Size
    step: Size
    shape: tuple[Size, ...]

    def of(self, x: torch.Tensor, evaluate: Callable[[Size], int]) -> torch.Tensor:
        """The range of a whole value."""
        bounds = (None if b is None else evaluate(b) for b in (self.start, self.end, self.step))
        return x[(*(slice(None),) * self.dim, slice(*bounds))]


@dataclass(frozen=True)
class Result:
    """How an output of the program leaves the ranks: "whole" (equal on all), or local:
    "deferred", gathered at first use, or "sharded", a DTensor. ranges: what is handed out of it."""

    kind: str
    shape: tuple[Size, ...]
    dtype: torch.dtype
    dim: int = 0
    lead: Size = 1
    ranges: tuple[Range, ...] = ()
    sequence: int = 0  # which one is cut

    def given(self, x: torch.Tensor, sizes: Mapping[sympy.Symbol, int]) -> torch.Tensor:
        """What is handed out of a whole value."""
        for r in self.ranges:
            x = r.of(x, lambda e: int(evaluate(e, sizes)))
        return x


def hand_out(
    a: Analysis, leaves: Collection[Factor], outputs: int
) -> tuple[Program, dict[int, tuple[Range, ...]]]:
    """outputs: how many of the program's outputs leave; the rest are written to inputs."""
    program, out = a.program, a.program.output
    by_name = {n.name: n for n in program.nodes}
    users = Counter(r.name for n in program.nodes for r in n.refs())
    trims = {
        r.node.name
        for r in a.records
        if any(role == "trim" for leaf in leaves for role, *_ in r.roles.get(leaf, ()))
    }
    ranges: dict[int, tuple[Range, ...]] = {}
    args = list(out.args)
    for i, x in enumerate(args[:outputs]):
        cuts: list[Range] = []
        kept = x
        while isinstance(x, Ref) and users[x.name] == 1 and by_name[x.name].op == SLICE:
            node = by_name[x.name]
            cuts.insert(0, _range(node))
            x = node.args[0]
            if node.name in trims:
                ranges[i], kept = tuple(cuts), x
        args[i] = kept
    if not ranges:
        return program, ranges
    nodes = (*program.nodes[:-1], replace(out, args=tuple(args)))
    return replace(program, nodes=nodes).without_dead_nodes(), ranges


def _range(n: Node) -> Range:
    names = ("self", "dim", "start", "end", "step")
    defaults: Arguments = (None, 0, None, None, 1)
    arguments = dict(zip(names, defaults)) | dict(zip(names, n.args)) | n.kwargs
    bounds = (arguments["start"], arguments["end"], arguments["step"])
    return Range(arguments["dim"] % len(n.type.shape), *bounds, tuple(n.type.shape))
