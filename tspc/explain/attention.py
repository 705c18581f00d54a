"""What attention computes, as text: the predicate, and how many blocks on each rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import sympy
import torch

from tspc.ir.body import evaluate
from tspc.ir.layout import Span
from tspc.ir.program import FOLD, Node, Ref
from tspc.ir.spec import CAUSAL, AttentionSpec
from tspc.masks.score import shown as readable
from tspc.ops.attention import ATTENTION, bound
from tspc.passes.lower.unit import Unit
from tspc.runtime.attention.blocks import Meeting, counted

CAT = torch.ops.aten.cat.default
Predicate = tuple[AttentionSpec, str]  # what says which blocks there are, and as a reader sees it


def lines(rewritten: Unit, ranks: int, sizes: Mapping[sympy.Symbol, int]) -> list[str]:
    """One of all attentions along one sequence under one predicate."""
    typed = rewritten.typed
    groups: dict[tuple[int, Predicate], list[str]] = {}
    nodes = {n.name: n for n in typed.program.nodes}
    for n in nodes.values():
        fold = n.kwargs["fold"] if n.op == FOLD else None
        records = typed.records if fold is None else fold.records
        for a in (n,) if fold is None else fold.body:
            i = typed.sequence(records[a.name].ins[0]) if a.op == ATTENTION else None
            if i is not None:
                name = a.name if fold is None else fold.name
                groups.setdefault((i, _told(a, nodes)), []).append(name)
    out = []
    for (i, (spec, shown)), names in groups.items():
        if not shown:
            continue
        values = tuple(int(evaluate(s, sizes)) for s in spec.sizes)
        extent = rewritten.choice.extents[i]
        layout, rows = extent.layout(ranks), int(extent.chunk_rows(ranks, sizes))
        span = Span(layout, rows, int(evaluate(extent.length, sizes)))
        meeting = Meeting(replace(spec, sizes=values), span, span)
        parts = [counted(meeting, tuple(layout.chunk_ids(r))) for r in range(layout.ranks)]
        by_rank = " ".join(str(n) for n, _, _ in parts)
        _, whole, edge = parts[0]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        out.append(
            f"attention: {names[0]}{more}: {shown}; blocks of {edge} by rank: {by_rank} of {whole}"
        )
    return out


def _told(n: Node, nodes: Mapping[str, Node]) -> Predicate:
    x, a = bound(n)
    shown = a.predicate
    for i, s in enumerate(a.sizes):
        shown = shown.replace(f"s{i}", str(s))
    for i, name in enumerate(_sources(x.data, nodes)):
        shown = shown.replace(f"d{i}[", f"{name}[")
    shown = " & ".join(t for t in (CAUSAL if a.causal else "", shown) if t)
    if a.score:
        shown = "; ".join(t for t in (shown, f"score {readable(a.score)}") if t)
    return AttentionSpec(a.causal, predicate=a.predicate, sizes=a.sizes), shown


def _sources(rows: Ref | None, nodes: Mapping[str, Node]) -> list[str]:
    """The values that the rows of data are of."""
    if rows is None:
        return []
    names = []
    parts = nodes[rows.name].refs() if nodes[rows.name].op == CAT else [rows]
    for r in parts:
        while ".rows" in r.name:
            r = nodes[r.name].refs()[0]
        names.append(r.name)
    return names
