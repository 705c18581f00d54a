"""A rewritten program as text: one line a node, its placement in the shape, the source line
last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy

from tspc.ir.program import FOLD, OUTPUT, PLACEHOLDERS, Node, Ref, Type
from tspc.ir.text import SHORT
from tspc.passes.analyse.fold import Fold
from tspc.passes.lower.unit import Unit


def show(
    rewritten: Unit,
    axis: str = "tsp",
    schedules: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The rewritten program as text, one line a node.

    schedules: by region name, as chosen for some sizes; else what the options ask for. notes: lines
    that come after the sequence's.
    """
    names = _symbol_names(rewritten)
    lines = [
        _line(n, rewritten, names, axis, schedules or {}) for n in rewritten.typed.program.nodes
    ]
    width = [max((len(l[k]) for l in lines), default=0) for k in range(3)]
    text = [
        "  ".join(c.ljust(w) for c, w in zip(l[:3], width)) + "  " + l[3] for l in lines if l[0]
    ]
    rows = (
        [
            f"sequence: {_size(f.size, names)}, layout {o}"
            for f, o in rewritten.choice.leaves.items()
        ]
        if rewritten.choice.leaves
        else ["no sequence"]
    )
    rows += notes
    return "\n".join(l.rstrip() for l in [*rows, *text])


def _symbol_names(rewritten: Unit) -> dict[sympy.Symbol, sympy.Symbol]:
    """S for the sequence, then B, and letters for the unnamed: stable over compiles."""
    out: dict[sympy.Symbol, sympy.Symbol] = {}
    leaf = rewritten.choice.leaf
    if leaf is not None and isinstance(leaf.size, sympy.Symbol):
        out[leaf.size] = sympy.Symbol("S")
    unnamed = [s for s in rewritten.symbols if s not in out]
    for s, letter in zip(unnamed, ["B", *(f"n{i}" for i in range(len(unnamed)))]):
        out[s] = sympy.Symbol(letter)
    return out


def _size(size: object, names: Mapping[sympy.Symbol, sympy.Symbol]) -> str:
    return str(size.xreplace(dict(names))) if isinstance(size, sympy.Expr) else str(size)


def _type(
    t: Type | None,
    place: str,
    cut: int | None,
    names: Mapping[sympy.Symbol, sympy.Symbol],
    axis: str,
) -> str:
    if t is None:
        return "-"
    dims = [_size(s, names) + (f"@{axis}" if k == cut else "") for k, s in enumerate(t.shape)]
    suffix = f" +{axis}" if place == "P" else f" ~{axis}" if place == "V" else ""
    return f"{SHORT.get(t.dtype, str(t.dtype))}[{', '.join(dims)}]{suffix}"


def _line(
    n: Node,
    rewritten: Unit,
    names: Mapping[sympy.Symbol, sympy.Symbol],
    axis: str,
    schedules: Mapping[str, str],
) -> tuple[str, str, str, str]:
    typed = rewritten.typed

    def one(item: int) -> str:
        place = typed.places.get((n.name, item), "R")
        dims = typed.dims.get((n.name, item), ())
        cut, i = None, typed.sequence(dims)
        if place == "S" and i is not None:
            leaf = typed.leaves[i]
            hits = [k for k, d in enumerate(dims) if leaf in typed.factors.leaves(tuple(d))]
            cut = hits[0] if hits else None
        return _type(n.types[item], place, cut, names, axis)

    types = ", ".join(one(i) for i in range(len(n.types)))
    if n.op in PLACEHOLDERS:
        storage = rewritten.choice.storages.get(n.name)
        cut = f" cut along dim {storage.map.dim}" if storage is not None and storage.map else ""
        return f"%{n.name}", types, f"{n.op}{cut}", n.source
    if n.op == OUTPUT:
        return "return", "", ", ".join(map(repr, n.args)), ""
    if n.op == FOLD:
        fold: Fold = n.kwargs["fold"]
        body = rewritten.bodies[fold.name]
        schedule = schedules.get(fold.name) or (
            fold.schedule if fold.schedule != "auto" else "broadcast" if body.attentions else "ring"
        )
        tokens = ", ".join(map(repr, (*n.args[0], *n.args[1], *n.args[2])))
        weights = " ".join(w.rsplit(".weight", 1)[0].rsplit(".", 1)[-1] for w in fold.weights)
        return (
            f"%{n.name}",
            types,
            f"fold[{schedule}]({tokens}; {weights}) {{{fold.name}}}",
            n.source,
        )
    op = n.op if isinstance(n.op, str) else n.op._schema.name.split("::")[1]
    return f"%{n.name}", types, f"{op}({', '.join(_value(a, names) for a in n.args)})", n.source


def _value(a: object, names: Mapping[sympy.Symbol, sympy.Symbol]) -> str:
    if isinstance(a, (tuple, list)):
        return "[" + ", ".join(_value(x, names) for x in a) + "]"
    if isinstance(a, Ref):
        return repr(a)
    return _size(a, names)
