"""What of a rewritten program costs a rank more than its share, and what to change: ops that run
replicated, weights gathered at use, outputs gathered whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy

from tspc.ir.body import evaluate
from tspc.ir.kinds import WHOLE
from tspc.ir.program import Ref, Type
from tspc.passes.ladder import ADVICE as ADVISED
from tspc.passes.lower.unit import Unit

LARGE = 64 * 2**20  # bytes: outputs below it are gathered without a word
ADVICE = {  # reason -> what to change
    "no rule": "use ops that have rules (docs/rules.md), or add a rule",
    "the sequence is part of a dim": "keep the sequence as a dim of its own",
}
PER_TOKEN = "keep it to single tokens, or move it out of the compiled model"


@dataclass(frozen=True)
class Report:
    """Something that runs replicated or is gathered: where, what, how to change it.

    bytes: whole on each rank, at the sizes asked for.
    """

    where: str
    what: str
    bytes: int
    change: str
    replicated: bool = True  # `strict` refuses it
    internal: bool = False  # an error inside of tspc is its cause

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.what}: {self.bytes / 2**20:.1f} MiB on each rank; {self.change}"
        )


def reports(rewritten: Unit, sizes: Mapping[sympy.Symbol, int] | None = None) -> list[Report]:
    """By kind, in the order of the program. sizes: by default those of the compile."""
    at = rewritten.analysis.program.hints if sizes is None else sizes
    choice, program = rewritten.choice, rewritten.analysis.program
    if rewritten.refused.everything:
        return [_everything(rewritten, at)]
    if choice.leaf is None and choice.refused:
        weights = sorted({w for g, _ in choice.refused for w in g.weights})
        size = sum(_bytes(program.node(w).type, at) for w in weights)
        what = (
            "no dim of this graph is a sequence: it runs replicated on all ranks and gathers its "
            f"weights at use ({', '.join(weights)})"
        )
        change = "give the model tokens [batch, sequence], or leave this part uncompiled"
        return [Report(program.node(program.output.refs()[0].name).source, what, size, change)]
    return _merged([*_ops(rewritten, at), *_weights(rewritten, at), *_outputs(rewritten, at)])


def _merged(all_reports: Sequence[Report]) -> list[Report]:
    """The same line of the model again, in other layers, is told once."""
    alike: dict[tuple[str, str], list[Report]] = {}
    for r in all_reports:
        alike.setdefault((r.where, r.what), []).append(r)
    return [
        replace(
            same[0],
            what=f"{what} ({len(same)} times)" if len(same) > 1 else what,
            bytes=sum(r.bytes for r in same),
        )
        for (_, what), same in alike.items()
    ]


def warnings(all_reports: Sequence[Report]) -> list[str]:
    """What to log of a compile: each that an error inside of tspc is the cause of, and one line for
    all others."""
    internal = [str(r) for r in all_reports if r.internal]
    others = [r for r in all_reports if not r.internal]
    return [*internal, *([warning(others)] if others else [])]


def warning(all_reports: Sequence[Report]) -> str:
    """One line for all of them: the largest, and how many there are."""
    first = max(all_reports, key=lambda r: r.bytes)
    more = len(all_reports) - 1
    return f"{first} (and {more} more: tspc.explain lists them)" if more else str(first)


def _bytes(t: Type | None, sizes: Mapping[sympy.Symbol, int]) -> int:
    if t is None:
        return 0
    count = 1
    for s in t.shape:
        count *= int(evaluate(s, sizes))
    return count * t.dtype.itemsize


def _everything(rewritten: Unit, sizes: Mapping[sympy.Symbol, int]) -> Report:
    """The last rung of the ladder."""
    refused, nodes = rewritten.refused, rewritten.analysis.program.nodes
    size = sum(_bytes(t, sizes) for n in nodes for t in n.types if t is not None and t.is_float)
    what = (
        f"an error inside of tspc ({refused.everything}): the whole graph runs replicated on all "
        "ranks, its weights gathered one op at a time, all that it makes"
    )
    return Report(refused.source, what, size, ADVISED, True, True)


def _ops(rewritten: Unit, sizes: Mapping[sympy.Symbol, int]) -> list[Report]:
    """Replicated ops: what is gathered for them, and what they make."""
    typed, original = rewritten.typed, rewritten.analysis.program
    nodes = {n.name: n for n in typed.program.nodes}
    why = {
        f.node: (f.op, f"runs replicated on all ranks ({f.why})", f.why) for f in typed.fallbacks
    }
    for name, op in rewritten.analysis.fallbacks:
        why[name] = (op, "has no rule and runs replicated", "no rule")
    refused = rewritten.refused
    out = []
    for name, (op, text, reason) in why.items():
        internal = name in refused
        if internal:
            text = f"runs replicated: an error inside of tspc ({refused.why(name)})"
        size = 0
        if name in nodes:
            gathered = (nodes[r.name] for r in set(nodes[name].refs()))
            types = [t for n in gathered if n.op == WHOLE for t in n.types] + [*nodes[name].types]
            size = sum(_bytes(t, sizes) for t in types)
        change = ADVICE.get(reason, PER_TOKEN)
        source = original.node(name).source
        change = ADVISED if internal else change
        out.append(Report(source, f"{op} {text}", size, change, True, internal))
    return out


def _weights(rewritten: Unit, sizes: Mapping[sympy.Symbol, int]) -> list[Report]:
    """Weights of regions that are not folded, unless a region has them all the same."""
    program, storages = rewritten.analysis.program, rewritten.choice.storages
    users = {r.name: n.source for n in reversed(program.nodes) for r in n.refs()}
    out, seen = [], set()
    for region, why in rewritten.choice.refused:
        weights = [w for w in sorted(region.weights) if storages[w].kind == "gather"]
        if seen.issuperset(weights):
            continue
        seen.update(weights)
        size = sum(_bytes(program.node(w).type, sizes) for w in weights)
        internal = bool(rewritten.refused.region(region.weights))
        why = f"an error inside of tspc: {why}" if internal else why
        what = f"{', '.join(weights)} gathered at use, not folded ({why})"
        change = "tokens stay cut; only these weights are whole, one op at a time"
        change = ADVISED if internal else change
        out.append(Report(users[weights[0]], what, size, change, internal, internal))
    return out


def _outputs(rewritten: Unit, sizes: Mapping[sympy.Symbol, int]) -> list[Report]:
    """Outputs cut along the sequence that leave whole; at a graph break all of them."""
    typed = rewritten.typed
    nodes = {n.name: n for n in typed.program.nodes}
    large = []
    for a, result in zip(typed.program.output.args, rewritten.results):
        whole = result is None or result.kind == "whole"
        if isinstance(a, Ref) and whole and typed.places[a.name, a.item or 0] == "S":
            n = nodes[a.name]
            large.append((n.source, _bytes(n.types[a.item or 0], sizes), n.types[a.item or 0]))
    if rewritten.graph_break:
        if not large:
            return []
        count = f"{len(large)} activation" + "s" * (len(large) > 1)
        what = f"a graph break, at which {count} cut along the sequence are gathered"
        change = "remove the break (TORCH_LOGS=graph_breaks tells its cause)"
        size = sum(size for _, size, _ in large)
        return [Report(rewritten.graph_break, what, size, change, False)]
    change = 'return only the loss, or compile with options={"outputs": "sharded"}'
    return [
        Report(
            where, f"an output {list(t.shape)} is gathered along the sequence", size, change, False
        )
        for where, size, t in large
        if size >= LARGE
    ]
