"""Rules of contractions, attention and look-ups."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from tspc.factors.factor import Dims
from tspc.factors.notation import Op, Rule, apply, fallback
from tspc.factors.registry import computed, rule
from tspc.ir.program import SDPA
from tspc.ops import counter  # noqa: F401  defines the ops
from tspc.ops.attention import ATTENTION, bound
from tspc.ops.sequence import SEQUENCE_CONV

aten = torch.ops.aten

rule(aten.linear.default, "... i, o i, o -> ... o", reduce="i", once=2)
rule(aten.mm.default, "m k, k n -> m n", reduce="k")
rule(aten.bmm.default, "b m k, b k n -> b m n", reduce="k")
rule(aten.baddbmm.default, "b m n, b m k, b k n -> b m n", reduce="k", once=0)
rule(aten.outer.default, "a, b -> a b")
rule(aten.embedding.default, "v d, ... -> ... d", select="v")


@computed(aten.addmm.default, once=0)
def addmm(op: Op) -> Sequence[Dims]:
    bias = "m n" if len(op.ins[0]) > 1 else "n"
    return apply(Rule.parse(f"{bias}, m k, k n -> m n", reduce="k"), op)


@computed(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(op: Op) -> Sequence[Dims]:
    """The channels are summed where nothing is added after the sum."""
    before, window, after = (
        " ".join(f"{l}{k}" for k in range(len(op.ins[1]) - 2)) for l in ("x", "w", "y")
    )
    b = "b " if len(op.ins[0]) == len(op.ins[1]) else ""
    places = f"{before} {window} {after}"
    if op.args["groups"] != 1:
        text = f"{b}c {before}, o i {window}, o -> {b}o {after}"
        return apply(Rule.parse(text, whole=f"c i o {places}"), op)
    roles = {"whole": places, "reduce": "c"}
    if op.refs[2] is not None:
        roles = {"whole": f"{places} c"}
    return apply(Rule.parse(f"{b}c {before}, o c {window}, o -> {b}o {after}", **roles), op)


@computed(SEQUENCE_CONV)
def sequence_conv(op: Op) -> Sequence[Dims]:
    """The length stays. Channels are summed where nothing is added after the sum, or each runs
    alone."""
    groups, biased = op.args["groups"], op.refs[2] is not None
    text, roles = "b c s, o c w, o -> b o s", {"whole": "w"}
    if groups == 1:
        roles = {"whole": "w c"} if biased else {"whole": "w", "reduce": "c"}
    elif groups == 0:
        text = "b c s, c 1 w, c -> b c s"
    else:
        text, roles = "b c s, o i w, o -> b o s", {"whole": "w c i o"}
    return apply(Rule.parse(text, halo="s", **roles), op)


@computed(SDPA, ATTENTION)
def attention(op: Op) -> Sequence[Dims]:
    """States go with the queries, a sink with its head, the data of a predicate with neither."""
    x, a = bound(op.node)
    h = "(k g)" if a.grouped else "k"
    n = len(op.ins[0])
    lead = [f"b{i}" for i in range(n - 3)]
    kv, query = ([*lead, k] if n > 2 else [] for k in ("k", h))
    mask = [*query, "q", "t"][-len(op.ins[3] or op.ins[0]) :]
    kv, query, mask = map(" ".join, (kv, query, mask))
    states = f"{query} q" if x.states is not None else ""
    data = f"{' '.join(lead[:1])} n p" if x.data is not None else ""
    ins = f"{query} q d, {kv} t d, {kv} t e, {mask}, {states}, {data}"
    return apply(
        Rule.parse(
            f"{ins}, {h if x.sinks is not None else ''} -> {query} q e",
            exchange="t",
            whole="d n p" if x.data is not None else "d",
            at="q" if a.causal or a.predicate else "",
        ),
        op,
    )


@computed(aten.matmul.default)
def matmul(op: Op) -> Sequence[Dims]:
    a, b = (len(d) for d in op.ins)
    return apply(
        Rule.parse(
            {(1, 1): "k, k -> ", (1, 2): "k, k n -> n"}.get((a, b))
            or (
                "... k, k -> ..."
                if b == 1
                else "k, ... k n -> ... n"
                if a == 1
                else "... m k, ... k n -> ... m n"
            ),
            reduce="k",
        ),
        op,
    )


@computed(aten.einsum.default)
def einsum(op: Op) -> Sequence[Dims]:
    left, arrow, right = op.args["equation"].replace(" ", "").partition("->")
    tensors = [re.findall(r"\.\.\.|\w", t) for t in left.split(",")]
    letters = [l for t in tensors for l in t if l != "..."]
    out = re.findall(r"\.\.\.|\w", right)
    if not arrow:
        out = ["..."] * ("..." in left) + sorted(l for l in letters if letters.count(l) == 1)
    if any(len(set(t)) < len(t) for t in tensors) or ("..." in left and "..." not in out):
        return fallback(op, "einsum of a diagonal or a sum over leading dims")
    text = ", ".join(map(" ".join, tensors)) + " -> " + " ".join(out)
    return apply(Rule.parse(text, reduce=" ".join(sorted(set(letters) - set(out)))), op)
