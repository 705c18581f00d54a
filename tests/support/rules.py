"""The rule of one op as it was applied to a sample, spelled in the notation of rules."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tspc.backend.brute import check, check_meaning, traced
from tspc.factors.factor import Dim, Factor, Factors
from tspc.ir.program import OUTPUT
from tspc.passes.analyse.factorize import Analysis, Record


class Letters:
    """Leaves as letters, in the order in which they are met; ' marks an image."""

    def __init__(self, factors: Factors) -> None:
        self.factors, self.names = factors, dict[Factor, str]()
        self.letters: Iterator[str] = iter(string.ascii_lowercase)

    def letter(self, f: Factor) -> str:
        if f.image_of is not None:
            return self.letter(self.factors.find(f.image_of)) + "'"
        if f not in self.names:
            self.names[f] = next(self.letters)
        return self.names[f]

    def product(self, dim: Sequence[Factor]) -> list[str]:
        return [
            "(" + " + ".join("".join(self.product(d)) for d in f.cat) + ")"
            if f.cat
            else self.letter(f)
            for f in self.factors.expand(tuple(dim))
        ]

    def dim(self, dim: Dim) -> str:
        parts = self.product(dim)
        return "1" if not parts else parts[0] if len(parts) == 1 else f"({' '.join(parts)})"

    def side(self, tensors: Sequence[Sequence[Dim]]) -> str:
        return ", ".join(" ".join(self.dim(tuple(d)) for d in dims) for dims in tensors)


def spelled(a: Analysis, r: Record) -> str:
    """ "operands -> results, role=letters" of what happened to the factors."""
    names = Letters(a.F)
    text = f"{names.side(r.ins)} -> {names.side(r.outs)}"
    roles: dict[str, set[str]] = {}
    for f, kinds in r.roles.items():
        for role, *_ in kinds:
            roles.setdefault(role, set()).add(names.letter(f))
    return text + "".join(f", {k}={' '.join(sorted(v))}" for k, v in sorted(roles.items()))


def applied(fn: Callable[..., Any], *tensors: torch.Tensor) -> tuple[str, int]:
    """(the rule of the last op of a function as it was applied, how many cuts of all ops were
    tried by brute force)."""
    a, env = traced(fn, *tensors)
    check_meaning(a, env)
    tried = sum(check(a, env).values())
    return spelled(a, [r for r in a.records if r.node.op != OUTPUT][-1]), tried
