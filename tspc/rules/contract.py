"""Rules of contractions, attention and look-ups."""

from __future__ import annotations

import torch

from tspc.rule import Op, Rule, apply, computed, rule

aten = torch.ops.aten

rule(aten.linear.default, "... i, o i, o -> ... o", reduce="i", once=2)
rule(aten.addmm.default, "n, m k, k n -> m n", reduce="k", once=0)
rule(aten.mm.default, "m k, k n -> m n", reduce="k")
rule(aten.bmm.default, "b m k, b k n -> b m n", reduce="k")
rule(aten.baddbmm.default, "b m n, b m k, b k n -> b m n", reduce="k", once=0)
rule(aten.embedding.default, "v d, ... -> ... d", select="v")
rule(aten.conv2d.default, "b c y x, o c k l, o -> b o p q", reduce="c", whole="y x k l", once=2)


@computed(aten.scaled_dot_product_attention.default)
def attention(op: Op) -> list:
    h = "(k g)" if op.args["enable_gqa"] else "k"
    mask = "... q t" if op.ins[3] and len(op.ins[3]) < 4 else f"b {h} q t"
    return apply(
        Rule.parse(
            f"b {h} q d, b k t d, b k t e, {mask} -> b {h} q e",
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
    left, right = op.args["equation"].replace(" ", "").split("->")

    def sp(t):
        return " ".join(t)

    return apply(
        Rule.parse(
            ", ".join(map(sp, left.split(","))) + " -> " + sp(right),
            reduce=sp(sorted(set(left) - set(right) - {","})),
        ),
        op,
    )
