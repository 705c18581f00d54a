"""The passes in order: a captured program -> one rank's program, its bodies and the storage of
its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
from tspc.passes.choose import GATHER, Choice, choose
from tspc.passes.factorize import Analysis, factorize
from tspc.passes.fold import outline
from tspc.passes.localize import LocalProgram, Result
from tspc.passes.masks import recognise_masks
from tspc.passes.normalize import normalize
from tspc.passes.pieces import make_body
from tspc.passes.propagate import Typed, propagate

from tspc.body import Body
from tspc.program import FOLD, Node, Program, Ref


@dataclass(frozen=True)
class Rewritten:
    """Everything that the passes decided.

    bodies: by region name, in order.
    """

    analysis: Analysis
    choice: Choice
    typed: Typed
    local: LocalProgram
    bodies: tuple[Body, ...]
    symbols: tuple[sympy.Symbol, ...]
    results: tuple[Result | None, ...]

    @property
    def folds(self) -> tuple[Node, ...]:
        """The fold nodes, in order."""
        return tuple(n for n in self.typed.program.nodes if n.op == FOLD)


def rewrite(
    program: Program,
    symbols: Sequence[sympy.Symbol],
    ranks: int,
    axis: str,
    schedule: str | Mapping[str, str] = "auto",
    layout: str = "auto",
    outputs: str = "auto",
) -> Rewritten:
    """Outputs: "auto" defers the non-scalar outputs of a program with a loss, "full" makes all
    whole."""
    program = recognise_masks(normalize(program))
    analysis = factorize(program)
    choice = choose(analysis, ranks, schedule, layout)
    deferred = _deferred(program) if outputs == "auto" else frozenset()
    leaves = frozenset([choice.leaf]) if choice.leaf is not None else frozenset()
    folded = outline(analysis, choice.regions, leaves, ranks, not deferred)
    gathered = {
        n: s.map.dim for n, s in choice.storages.items() if s.kind == GATHER and s.map is not None
    }
    typed = propagate(folded, analysis, choice.leaf, gathered, choice.lookups)
    nodes, bodies = [], []
    for n in typed.program.nodes:
        if n.op == FOLD:
            body = make_body(n.kwargs["fold"], typed, n.args, symbols, ranks, choice.order)
            bodies.append(body)
            n = replace(n, kwargs={**n.kwargs, "body": body})
        nodes.append(n)
    typed = replace(typed, program=replace(typed.program, nodes=tuple(nodes)))
    local = LocalProgram(typed, symbols, choice.order, axis, deferred)
    results = tuple(local.results())
    return Rewritten(analysis, choice, typed, local, tuple(bodies), tuple(symbols), results)


def _deferred(program: Program) -> frozenset[int]:
    """Outputs to defer: all that are not scalars, where one is a differentiable scalar."""
    types = {n.name: n.types for n in program.nodes}

    def scalar(a: object) -> bool:
        if not isinstance(a, Ref):
            return False
        t = types[a.name][a.item or 0]
        return t is not None and not t.shape and t.requires_grad

    outs = program.output.args
    if not any(map(scalar, outs)):
        return frozenset()
    return frozenset(i for i, a in enumerate(outs) if isinstance(a, Ref) and not scalar(a))
