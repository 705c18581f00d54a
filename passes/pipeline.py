"""The passes in order: a captured program -> one rank's program, its bodies and the storage of
its parameters."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import sympy

from tspc import budget
from tspc.body import Body, made_again
from tspc.counter import ATTENTIONS
from tspc.hardware import Hardware
from tspc.lookup import Lookups, lookups, watched
from tspc.options import Options
from tspc.passes.apart import run_apart
from tspc.passes.attend import find_attention
from tspc.passes.choose import GATHER, Choice, choose
from tspc.passes.draws import draw_by_counter
from tspc.passes.factorize import Analysis
from tspc.passes.fold import outline
from tspc.passes.ladder import NOTHING, Refused, at_hand, climb
from tspc.passes.localize import LocalProgram
from tspc.passes.masks import recognise_masks
from tspc.passes.normalize import normalize
from tspc.passes.outputs import Range, Result, hand_out
from tspc.passes.pieces import make_body
from tspc.passes.propagate import propagate
from tspc.passes.seal import analyse
from tspc.passes.sequence import sequences
from tspc.passes.typed import Typed
from tspc.passes.verify import check_program, check_typed
from tspc.passes.windows import widen
from tspc.program import APART, FOLD, SEED, Node, Program, Ref


@dataclass(frozen=True)
class Rewritten:
    """Everything that the passes decided.

    bodies: by region name, in order. keepings: of the regions with matrix products to keep.
    graph_break: where the graph ends in one.
    """

    analysis: Analysis
    choice: Choice
    typed: Typed
    local: LocalProgram
    bodies: tuple[Body, ...]
    symbols: tuple[sympy.Symbol, ...]
    results: tuple[Result | None, ...]
    keepings: tuple[budget.Keeping, ...] = ()
    graph_break: str = ""
    lookups: Lookups = field(default=Lookups(), repr=False)
    refused: Refused = NOTHING

    @property
    def draws(self) -> bool:
        """Its last placeholder is the seed of its random ops."""
        return any(n.name == SEED for n in self.typed.program.nodes)

    @property
    def folds(self) -> tuple[Node, ...]:
        """The fold nodes, in order."""
        return tuple(n for n in self.typed.program.nodes if n.op == FOLD)


def rewrite(
    program: Program,
    symbols: Sequence[sympy.Symbol],
    ranks: int,
    axis: str,
    options: Options,
    hardware: Hardware,
    writes: int = 0,
    refused: Refused = NOTHING,
) -> Rewritten:
    """writes: how many of the last outputs are new values of inputs. refused: what is left alone;
    what the passes cannot treat is refused too, and they start again."""

    def attempt(refused: Refused) -> Rewritten:
        rest = (symbols, ranks, axis, options, hardware, writes, refused)
        return _rewrite(program, *rest)

    return climb(attempt, program, options.strict, refused)


def _rewrite(
    program: Program,
    symbols: Sequence[sympy.Symbol],
    ranks: int,
    axis: str,
    options: Options,
    hardware: Hardware,
    writes: int,
    refused: Refused,
) -> Rewritten:
    program = prepare(program, refused)
    with _during("lookups"):
        looked_up = lookups(program)
    analysis = _analysed(program, refused)
    ranges: dict[int, tuple[Range, ...]] = {}
    if options.outputs != "sharded":
        count = len(program.output.args) - writes
        handed, ranges = hand_out(analysis, sequences(analysis), count)
        if ranges:
            check_program(handed, "outputs")
            program, analysis = handed, _analysed(handed, refused)
    for i in range(len(sequences(analysis))):
        program, analysis = _widened(program, analysis, i, refused)
    with _during("choose"):
        choice = choose(analysis, ranks, options.schedule, options.layout, refused)
    left = _local(program, options.outputs, writes)
    cotangents = "deferred" not in left.values()
    leaves = frozenset(choice.leaves)

    def fold(_: Program) -> Program:
        return outline(analysis, choice.regions, leaves, ranks, cotangents)

    folded = _pass("fold", fold, program)
    gathered = {
        n: s.map.dim for n, s in choice.storages.items() if s.kind == GATHER and s.map is not None
    }
    with _during("propagate"):
        typed = propagate(folded, analysis, tuple(choice.leaves), gathered, choice.lookups)
        check_typed(typed)
    _dump("propagate", typed.program)
    bodies = {}
    for n in typed.program.nodes:
        if n.op == FOLD:
            rest = (symbols, ranks, choice.leaves, hardware)
            kept = (_saves(n, typed.program), options.reduce_dtype)
            with _during("pieces"):
                bodies[n.name] = make_body(n.kwargs["fold"], typed, n.args, *rest, *kept)
    names = {n.kwargs["fold"].name: n.name for n in typed.program.nodes if n.op == FOLD}
    regions = [(name, bodies[node]) for name, node in names.items()]
    keepings = budget.choose(options.memory_budget, regions, program.hints)
    for k in keepings:
        if not k.kept:
            bodies[names[k.name]] = made_again(k.body)
    nodes = tuple(
        replace(n, kwargs={**n.kwargs, "body": bodies[n.name]})
        if n.op == FOLD
        else replace(n, kwargs={**n.kwargs, "run": run_apart})
        if n.op == APART
        else n
        for n in typed.program.nodes
    )
    typed = replace(typed, program=replace(typed.program, nodes=nodes))
    local = LocalProgram(typed, symbols, choice.leaves, axis, left, options.reduce_dtype)
    results = tuple(
        replace(r, ranges=ranges[i]) if r is not None and i in ranges else r
        for i, r in enumerate(local.results())
    )
    rest = tuple(bodies.values()), tuple(symbols), results, keepings
    return Rewritten(analysis, choice, typed, local, *rest, lookups=looked_up, refused=refused)


def _analysed(program: Program, refused: Refused) -> Analysis:
    with _during("factorize"):
        return analyse(program, refused)


def _widened(
    program: Program, analysis: Analysis, index: int, refused: Refused
) -> tuple[Program, Analysis]:
    """Along one of the sequences."""
    leaf = dict(enumerate(sequences(analysis))).get(index)
    widened = _pass("windows", lambda _: widen(analysis, leaf), program)
    if widened.nodes == program.nodes:
        return program, analysis
    return widened, _analysed(widened, refused)


def prepare(program: Program, refused: Refused = NOTHING) -> Program:
    """The program in the form that is analysed; on one device it runs as it stands."""
    for name, run in (
        ("normalize", normalize),
        ("attend", find_attention),
        ("masks", recognise_masks),
    ):
        program = _pass(name, partial(run, refused=refused), program)
    return _pass("watched", watched, _pass("draws", draw_by_counter, program))


def _saves(fold: Node, program: Program) -> bool:
    """In a checkpointed part only what the backward runs again anyway keeps its products for it."""
    group = fold.recompute
    if not group or any(n.op in ATTENTIONS for n in fold.kwargs["fold"].body):
        return True
    after = {fold.name}
    for n in program.nodes:
        if n.recompute == group and any(r.name in after for r in n.refs()):
            if n.op == FOLD:
                return True
            after.add(n.name)
    return False


PASSES = ("normalize", "attend", "masks", "draws", "watched", "windows", "fold", "propagate")


def _pass(name: str, run: Callable[[Program], Program], program: Program) -> Program:
    """Do one pass, check and dump what it made."""
    start = time.perf_counter()
    with _during(name):
        made = run(program)
        check_program(made, name)
    if os.environ.get("TSPC_DEBUG"):
        seconds = time.perf_counter() - start
        print(f"tspc: {name}: {len(made.nodes)} nodes, {seconds:.3f} s", file=sys.stderr)
    _dump(name, made)
    return made


@contextmanager
def _during(name: str) -> Iterator[None]:
    """Say in which pass an error arose, and at which node."""
    try:
        yield
    except Exception as e:
        node = next((x for x in at_hand(e) if isinstance(x, Node)), None)
        at = f", at %{node.name} = {node.op}, {node.source}" if node is not None else ""
        e.add_note(f"in pass {name} of tspc{at}")
        raise


def _dump(name: str, program: Program) -> None:
    """TSPC_DEBUG=2 prints the program, TSPC_DUMP=dir writes it as dir/2_fold.txt."""
    if os.environ.get("TSPC_DEBUG") == "2":
        print(program, file=sys.stderr)
    folder = os.environ.get("TSPC_DUMP")
    if folder:
        number = PASSES.index(name)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f"{number}_{name}.txt"), "w") as f:
            f.write(f"{program}\n")


def _local(program: Program, outputs: str, writes: int) -> dict[int, str]:
    """Output -> how it is handed out where it lies, if it is cut: not a scalar, and for "auto"
    only where one is a differentiable scalar."""
    types = {n.name: n.types for n in program.nodes}

    def scalar(a: object, differentiable: bool) -> bool:
        t = types[a.name][a.item or 0] if isinstance(a, Ref) else None
        return t is not None and not t.shape and (t.requires_grad or not differentiable)

    outs = program.output.args
    outs = outs[: len(outs) - writes]
    if outputs == "full" or (outputs == "auto" and not any(scalar(a, True) for a in outs)):
        return {}
    kind = "sharded" if outputs == "sharded" else "deferred"
    loss = kind == "deferred"
    return {i: kind for i, a in enumerate(outs) if isinstance(a, Ref) and not scalar(a, loss)}
