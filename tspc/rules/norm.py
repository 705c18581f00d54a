"""Rules of reductions, norms and what needs a dim whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tspc.factors.factor import Dims, const
from tspc.factors.notation import Op, Rule, apply
from tspc.factors.registry import computed, rule

aten = torch.ops.aten


rule(aten.tril.default, "... a b -> ... a b", whole="a b")
rule(aten.triu.default, "... a b -> ... a b", whole="a b")


def letters(n: int) -> list[str]:
    return [f"a{k}" for k in range(n)]


def at(op: Op, dim: int, i: int = 0) -> int:
    return dim % len(op.ins[i])


@computed(aten.rms_norm.default, aten.layer_norm.default)
def norm(op: Op) -> Sequence[Dims]:
    d = " ".join(letters(len(op.args["normalized_shape"])))
    return apply(Rule.parse(f"... {d}, {d}, {d} -> ... {d}", whole=d), op)


def along(op: Op, role: str, keep: bool) -> Sequence[Dims]:
    """Ops along args['dim']: the dim gets the role and stays, or goes."""
    n = len(op.ins[0])
    dims = op.args.get("dim", op.args.get("dims"))
    dims = (
        range(n)
        if dims in (None, (), [])
        else [at(op, d) for d in (dims if isinstance(dims, tuple) else (dims,))]
    )
    ls = letters(n)
    out = [
        ls[k] if k not in dims else "1"
        for k in range(n)
        if keep or k not in dims or op.args.get("keepdim")
    ]
    if keep:
        out = ls
    outs = ", ".join([" ".join(out)] * len(op.node.types))
    return apply(
        Rule.parse(f"{' '.join(ls)} -> {outs}", **{role: " ".join(ls[d] for d in dims)}), op
    )


@computed(aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default)
def reduction(op: Op) -> Sequence[Dims]:
    return along(op, "reduce", False)


@computed(
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten.cumprod.default,
    aten.logcumsumexp.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.sort.default,
    aten.sort.stable,
)
def whole_dim(op: Op) -> Sequence[Dims]:
    return along(op, "whole", True)


@computed(aten.cumsum.default)
def scanned(op: Op) -> Sequence[Dims]:
    return along(op, "scan", True)


@computed(aten.flip.default, aten.roll.default)
def moved(op: Op) -> Sequence[Dims]:
    """By fixed numbers of rows, in a dim of its own."""
    moves = op.args.get("shifts", ())
    fixed = all(const(m) for m in (moves if isinstance(moves, tuple) else (moves,)))
    return along(op, "halo" if fixed and op.args["dims"] else "whole", True)


@computed(
    aten.amax.default,
    aten.amin.default,
    aten.max.dim,
    aten.min.dim,
    aten.argmax.default,
    aten.argmin.default,
    aten.aminmax.default,
    aten.median.dim,
    aten.kthvalue.default,
    aten.prod.dim_int,
    aten.var.dim,
    aten.var.correction,
    aten.std.dim,
    aten.std.correction,
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
    aten.any.dim,
    aten.all.dim,
)
def whole_reduction(op: Op) -> Sequence[Dims]:
    return along(op, "whole", False)


@computed(aten.logsumexp.default)
def logsumexp(op: Op) -> Sequence[Dims]:
    return along(op, "lse", False)
