"""The passes in order: a captured program -> one rank's program, its bodies and the storage of
its parameters."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
from tspc.passes.regions import sequence
from tspc.passes.verify import check_program, check_typed
from tspc.passes.windows import widen

from tspc.body import Body
from tspc.hardware import HARDWARE, Hardware
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
    hardware: Hardware = HARDWARE["cpu"],
    save: bool = True,
) -> Rewritten:
    """save: keep the results of a region's matrix products for its backward.

    Outputs: "auto" defers the non-scalar outputs of a program with a loss, "full" makes all
    whole."""
    program = _pass("normalize", normalize, program)
    program = _pass("masks", recognise_masks, program)
    analysis = factorize(program)
    widened = widen(analysis, sequence(analysis))
    if widened.nodes != program.nodes:
        program = _pass("windows", lambda _: widened, program)
        analysis = factorize(program)
    choice = choose(analysis, ranks, schedule, layout)
    deferred = _deferred(program) if outputs == "auto" else frozenset()
    leaves = frozenset([choice.leaf]) if choice.leaf is not None else frozenset()

    def fold(_: Program) -> Program:
        return outline(analysis, choice.regions, leaves, ranks, not deferred)

    folded = _pass("fold", fold, program)
    gathered = {
        n: s.map.dim for n, s in choice.storages.items() if s.kind == GATHER and s.map is not None
    }
    typed = propagate(folded, analysis, choice.leaf, gathered, choice.lookups)
    check_typed(typed)
    _dump("propagate", typed.program)
    nodes, bodies = [], []
    for n in typed.program.nodes:
        if n.op == FOLD:
            body = make_body(
                n.kwargs["fold"], typed, n.args, symbols, ranks, choice.order, hardware, save
            )
            bodies.append(body)
            n = replace(n, kwargs={**n.kwargs, "body": body})
        nodes.append(n)
    typed = replace(typed, program=replace(typed.program, nodes=tuple(nodes)))
    local = LocalProgram(typed, symbols, choice.order, axis, deferred)
    results = tuple(local.results())
    return Rewritten(analysis, choice, typed, local, tuple(bodies), tuple(symbols), results)


def _pass(name: str, run: Callable[[Program], Program], program: Program) -> Program:
    """Run one pass, check and dump what it made, say in which pass an error arose."""
    start = time.perf_counter()
    try:
        made = run(program)
    except Exception as e:
        e.add_note(f"in pass {name} of tspc") if hasattr(e, "add_note") else None
        raise
    check_program(made, name)
    if os.environ.get("TSPC_DEBUG"):
        seconds = time.perf_counter() - start
        print(f"tspc: {name}: {len(made.nodes)} nodes, {seconds:.3f} s", file=sys.stderr)
    _dump(name, made)
    return made


def _dump(name: str, program: Program) -> None:
    """TSPC_DEBUG=2 prints the program, TSPC_DUMP=dir writes it as dir/2_fold.txt."""
    if os.environ.get("TSPC_DEBUG") == "2":
        print(program, file=sys.stderr)
    folder = os.environ.get("TSPC_DUMP")
    if folder:
        number = ("normalize", "masks", "windows", "fold", "propagate").index(name)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f"{number}_{name}.txt"), "w") as f:
            f.write(f"{program}\n")


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
