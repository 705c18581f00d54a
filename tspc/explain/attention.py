"""What attention computes, as text: the predicate, and how many blocks on each rank."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch

from tspc.ir.body import evaluate
from tspc.ir.program import FOLD, Node, Ref, Size
from tspc.masks.score import shown as readable
from tspc.ops.counter import ATTENTIONS
from tspc.passes.rewrite.masks import bind
from tspc.passes.unit import Unit
from tspc.runtime.attention.blocks import CAUSAL, Spec, counted

CAT = torch.ops.aten.cat.default
# (causal, predicate, the same as a reader sees it, sizes)
Predicate = tuple[bool, str, str, tuple[Size, ...]]


def lines(rewritten: Unit, ranks: int, sizes: Mapping[sympy.Symbol, int]) -> list[str]:
    """One of all attentions along one sequence under one predicate."""
    typed = rewritten.typed
    groups: dict[tuple[int, Predicate], list[str]] = {}
    nodes = {n.name: n for n in typed.program.nodes}
    for n in nodes.values():
        fold = n.kwargs["fold"] if n.op == FOLD else None
        records = typed.records if fold is None else fold.records
        for a in (n,) if fold is None else fold.body:
            i = typed.sequence(records[a.name].ins[0]) if a.op in ATTENTIONS else None
            if i is not None:
                name = a.name if fold is None else fold.name
                groups.setdefault((i, _told(a, nodes)), []).append(name)
    out = []
    for (i, (causal, text, shown, numbers)), names in groups.items():
        if not shown:
            continue
        values = tuple(int(evaluate(s, sizes)) for s in numbers)
        extent = rewritten.choice.extents[i]
        layout, rows = extent.layout(ranks), int(extent.chunk_rows(ranks, sizes))
        length = int(evaluate(extent.length, sizes))
        spec = Spec(causal, 1.0, rows, length, 0.0, text, values)
        parts = [counted(spec, tuple(layout.chunk_ids(r))) for r in range(layout.ranks)]
        by_rank = " ".join(str(n) for n, _, _ in parts)
        _, whole, edge = parts[0]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        out.append(
            f"attention: {names[0]}{more}: {shown}; blocks of {edge} by rank: {by_rank} of {whole}"
        )
    return out


def _told(n: Node, nodes: Mapping[str, Node]) -> Predicate:
    bound = bind(n)
    text, causal = bound["predicate"], bool(bound["is_causal"])
    shown = text
    sizes = tuple(bound["sizes"])
    for i, s in enumerate(sizes):
        shown = shown.replace(f"s{i}", str(s))
    for i, name in enumerate(_sources(bound["rows"], nodes)):
        shown = shown.replace(f"d{i}[", f"{name}[")
    shown = " & ".join(t for t in (CAUSAL if causal else "", shown) if t)
    if score := bound["score"]:
        shown = "; ".join(t for t in (shown, f"score {readable(score)}") if t)
    return causal, text, shown, sizes


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
