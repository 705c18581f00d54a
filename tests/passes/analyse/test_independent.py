"""Values in a region that its factor does not touch: made apart, once."""

from __future__ import annotations

import torch

from tests.support.programs import analysis_of
from tests.support.samples import x
from tspc.ir.program import Ref
from tspc.passes.analyse.independent import independent, is_independent, makers_in, makers_of
from tspc.passes.analyse.regions import Region, find_regions
from tspc.passes.analyse.sequence import sequences

aten = torch.ops.aten
Tensor = torch.Tensor
HEADS, D = 3, 4


def attention(tokens: Tensor, fused: Tensor, out: Tensor) -> Tensor:
    """All queries and one key and value head of one weight."""
    both = aten.linear.default(tokens, fused)
    q, k, v = aten.split_with_sizes.default(both, [HEADS * D, D, D], 2)
    q = aten.transpose.int(aten.view.default(q, [2, 5, HEADS, D]), 1, 2)
    k, v = (aten.unsqueeze.default(t, 1) for t in (k, v))
    y = torch.ops.tspc.scaled_dot_product_attention.default(q, k, v, grouped=True)
    y = aten.reshape.default(aten.transpose.int(y, 1, 2), [2, 5, HEADS * D])
    return aten.linear.default(y, out).softmax(-1).square().mean()


A = analysis_of(
    attention,
    x(2, 5, 7),
    params={"fused": x(HEADS * D + 2 * D, 7), "out": x(7, HEADS * D)},
)
(HEAD,) = (g for g in find_regions(A, set(sequences(A))).chosen if "fused" in g.weights)
MAKERS = makers_in(A, HEAD)
SPLIT = next(r for r in A.records if r.node.op == aten.split_with_sizes.default)


def test_the_region_is_of_the_heads() -> None:
    assert HEAD.factor.size == HEADS and set(MAKERS) >= {SPLIT.node.name}


def test_other_segments_are_independent() -> None:
    assert independent(SPLIT, HEAD.factor) == {1, 2}
    assert independent(SPLIT, A.F.new(3)) == set()
    last = A.records[-4]
    assert independent(last, HEAD.factor) == set()


def test_a_value_that_can_be_made_without_the_fold() -> None:
    name = SPLIT.node.name
    assert is_independent(Ref(name, 1), MAKERS, HEAD) and is_independent(Ref(name, 2), MAKERS, HEAD)
    assert not is_independent(Ref(name, 0), MAKERS, HEAD)
    assert not is_independent(Ref("x0"), MAKERS, HEAD)


def test_what_is_behind_a_value_in_order() -> None:
    names = [r.node.op for r in makers_of(Ref(SPLIT.node.name, 1), MAKERS, HEAD.factor)]
    assert names == [aten.linear.default, aten.split_with_sizes.default]
    assert makers_of(Ref("x0"), MAKERS, HEAD.factor) == []


def test_without_its_first_op_it_is_not_made_apart() -> None:
    first = min(HEAD.ops)
    part = Region(HEAD.factor, [], HEAD.ops - {first})
    assert not is_independent(Ref(SPLIT.node.name, 1), makers_in(A, part), part)
