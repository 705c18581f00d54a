"""The passes in order: a captured program -> one rank's program, its bodies and the storage of
its parameters."""

from __future__ import annotations

from dataclasses import replace

from tspc.cost import budget
from tspc.ir.body import Body, recomputing
from tspc.ir.program import FOLD, Node, Program, Ref
from tspc.ops.attention import ATTENTION
from tspc.ops.lookup import lookups, watched
from tspc.passes.analyse.fold import outline
from tspc.passes.analyse.outputs import hand_out
from tspc.passes.analyse.seal import analyse
from tspc.passes.analyse.sequence import sequences
from tspc.passes.analyse.windows import widen
from tspc.passes.ladder import climb
from tspc.passes.lower.choose import GATHER, choose
from tspc.passes.lower.localize import Target, localize, results
from tspc.passes.lower.pieces import make_body
from tspc.passes.lower.propagate import propagate
from tspc.passes.lower.unit import Unit
from tspc.passes.rewrite.attend import find_attention
from tspc.passes.rewrite.draws import draw_by_counter
from tspc.passes.rewrite.masks import recognise_masks
from tspc.passes.rewrite.normalize import normalize
from tspc.passes.runner import Pass, run


def rewrite(unit: Unit) -> Unit:
    """The unit after all passes. What they cannot treat is refused, and they start again."""
    options = unit.options
    return climb(
        lambda refused: run(PIPELINE, replace(unit, refused=refused)),
        unit.program,
        options.strict,
        unit.refused,
    )


def prepare(program: Program) -> Program:
    """The program in the form that is analysed; on one device it runs as it stands."""
    return run(PREPARE, Unit(program)).program


def _factorize(u: Unit) -> Unit:
    """Nothing to do where the analysis is of this program."""
    if u.analysis is not None and u.analysis.program is u.program:
        return u
    return replace(u, analysis=analyse(u.program, u.refused))


def _outputs(u: Unit) -> Unit:
    if u.options.outputs == "sharded":
        return u
    count = len(u.program.output.args) - u.writes
    program, ranges = hand_out(u.analysis, sequences(u.analysis), count)
    return replace(u, program=program, ranges=ranges)


def _windows(u: Unit) -> Unit:
    """Along one sequence after the other."""
    for i in range(len(sequences(u.analysis))):
        leaf = dict(enumerate(sequences(u.analysis))).get(i)
        program = widen(u.analysis, leaf)
        if program.nodes != u.program.nodes:
            u = _factorize(replace(u, program=program))
    return u


def _choose(u: Unit) -> Unit:
    options = u.options
    choice = choose(u.analysis, u.ranks, options.schedule, options.layout, u.refused)
    return replace(u, choice=choice, leaving=_leaving(u.program, options.outputs, u.writes))


def _fold(u: Unit) -> Unit:
    cotangents = "deferred" not in u.leaving.values()
    leaves = frozenset(u.choice.leaves)
    return replace(u, program=outline(u.analysis, u.choice.regions, leaves, u.ranks, cotangents))


def _propagate(u: Unit) -> Unit:
    gathered = {
        n: s.map.dim for n, s in u.choice.storages.items() if s.kind == GATHER and s.map is not None
    }
    leaves = tuple(u.choice.leaves)
    typed = propagate(u.program, u.analysis, leaves, gathered, u.choice.lookups)
    return replace(u, typed=typed, program=typed.program)


def _bodies(u: Unit) -> Unit:
    """Layers of one structure share a body."""
    by_key, bodies = dict[str, Body](), dict[str, Body]()
    for n in u.folds:
        body = make_body(n, u, _saves(n, u.program))
        bodies[n.kwargs["fold"].name] = by_key.setdefault(body.key, body)
    return replace(u, bodies=bodies)


def _keep(u: Unit) -> Unit:
    """Which bodies keep matrix products for the backward."""
    regions = list(u.bodies.items())
    keepings = budget.choose(u.options.memory_budget, regions, u.program.hints)
    dropped = {k.body for k in keepings if not k.kept}
    again = {b: recomputing(b) for b in dropped}
    kept = {k.name: again[k.body] for k in keepings if not k.kept}
    return replace(u, keepings=keepings, bodies={**u.bodies, **kept})


def _localize(u: Unit) -> Unit:
    orders = tuple(u.choice.leaves[f] for f in u.typed.leaves)
    target = Target(u.bodies, orders, u.axis, u.leaving, u.options.reduce_dtype)
    outs = tuple(
        replace(r, ranges=u.ranges[i]) if r is not None and i in u.ranges else r
        for i, r in enumerate(results(u.typed, u.leaving))
    )
    return replace(u, local=localize(u.typed, target, u.stored), results=outs)


PREPARE = (
    Pass("normalize", lambda u: replace(u, program=normalize(u.program, u.refused))),
    Pass("attend", lambda u: replace(u, program=find_attention(u.program, u.refused))),
    Pass("masks", lambda u: replace(u, program=recognise_masks(u.program, u.refused))),
    Pass("draws", lambda u: replace(u, program=draw_by_counter(u.program))),
    Pass("watched", lambda u: replace(u, program=watched(u.program))),
)
FACTORIZE = Pass("factorize", _factorize)
PIPELINE = (
    *PREPARE,
    Pass("lookups", lambda u: replace(u, lookups=lookups(u.program))),
    FACTORIZE,
    Pass("outputs", _outputs),
    FACTORIZE,
    Pass("windows", _windows),
    Pass("choose", _choose),
    Pass("fold", _fold),
    Pass("propagate", _propagate),
    Pass("pieces", _bodies),
    Pass("budget", _keep),
    Pass("localize", _localize),
)


def _saves(fold: Node, program: Program) -> bool:
    """In a checkpointed part only what the backward runs again anyway keeps its products for it."""
    group = fold.recompute
    if not group or any(n.op == ATTENTION for n in fold.kwargs["fold"].body):
        return True
    after = {fold.name}
    for n in program.nodes:
        if n.recompute == group and any(r.name in after for r in n.refs()):
            if n.op == FOLD:
                return True
            after.add(n.name)
    return False


def _leaving(program: Program, outputs: str, writes: int) -> dict[int, str]:
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
