"""The structural key of a body: what decides its compiled pieces and its schedule, with canonical
names of values. Layers of one structure share their pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import sympy
import torch

from tspc.ir.body import Out, Token
from tspc.ir.program import Ref, Size, Type
from tspc.passes.analyse.fold import Fold
from tspc.passes.lower.run_piece import Table


def structural_key(
    fold: Fold,
    extents: Sequence[tuple[Size, str]],
    names: Mapping[Ref, str],
    values: Mapping[str, Type],
    tables: Mapping[Ref, Table],
    symbols: Sequence[sympy.Symbol],
    others: tuple[object, ...],
) -> str:
    """extents: length and order of the sequences. tables: what is read at the units of a shard.

    others: all else.
    """

    def show(a: object) -> str:
        if isinstance(a, Ref):
            return names[a]
        if isinstance(a, (tuple, list)):
            return "(" + ",".join(map(show, a)) + ")"
        if isinstance(a, sympy.Expr):
            return str(a)
        if isinstance(a, Token):
            return show((a.name, a.dim, a.lead, a.whole, a.sequence))
        if isinstance(a, Out):
            return show((a.name, a.kind, a.dim, a.lead, a.differentiable, a.sequence))
        return repr(a)

    lines = [show(others), str((fold.units, fold.size)), show(extents)]
    lines += map(sympy.srepr, symbols)  # sizes are told over the program's own symbols
    lines += [f"{k} {show(v.shape)} {v.dtype} {v.requires_grad}" for k, v in values.items()]
    for n in fold.body:
        kwargs = ",".join(f"{k}={show(v)}" for k, v in n.kwargs.items())
        lines.append(f"{names[Ref(n.name)]} {n.op} {show(n.args)} {kwargs}")
    lines += [f"{names[r]} {t.dim} {t.rows}" for r, t in tables.items()]
    text = "\n".join([*lines, torch.__version__])
    return hashlib.sha256(text.encode()).hexdigest()[:20]
