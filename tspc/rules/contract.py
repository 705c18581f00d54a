"""Rules of contractions, attention and look-ups."""

from __future__ import annotations

import re

import torch

from tspc.rule import Op, Rule, apply, computed, fallback, rule

aten = torch.ops.aten

rule(aten.linear.default, "... i, o i, o -> ... o", reduce="i", once=2)
rule(aten.mm.default, "m k, k n -> m n", reduce="k")
rule(aten.bmm.default, "b m k, b k n -> b m n", reduce="k")
rule(aten.baddbmm.default, "b m n, b m k, b k n -> b m n", reduce="k", once=0)
rule(aten.outer.default, "a, b -> a b")
rule(aten.embedding.default, "v d, ... -> ... d", select="v")


@computed(aten.addmm.default)
def addmm(op: Op) -> list:
    bias = "m n" if len(op.ins[0]) > 1 else "n"
    return apply(Rule.parse(f"{bias}, m k, k n -> m n", reduce="k", once=0), op)


@computed(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(op: Op) -> list:
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
    if op.ins[2] is not None:
        roles = {"whole": f"{places} c"}
    return apply(Rule.parse(f"{b}c {before}, o c {window}, o -> {b}o {after}", **roles), op)


@computed(aten.scaled_dot_product_attention.default)
def attention(op: Op) -> list:
    h = "(k g)" if op.args["enable_gqa"] else "k"
    n = len(op.ins[0])
    lead = [f"b{i}" for i in range(n - 3)]
    kv, query = ([*lead, k] if n > 2 else [] for k in ("k", h))
    mask = [*query, "q", "t"][-len(op.ins[3] or op.ins[0]) :]
    kv, query, mask = map(" ".join, (kv, query, mask))
    return apply(
        Rule.parse(
            f"{query} q d, {kv} t d, {kv} t e, {mask} -> {query} q e",
            exchange="t",
            whole="d",
            at="q" if op.args["is_causal"] else "",
        ),
        op,
    )


@computed(aten.matmul.default)
def matmul(op: Op) -> list:
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
def einsum(op: Op) -> list:
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
