"""Regions become the bodies of fold nodes: from text to text, and the sum over the shards is the
whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.goldens import cases, check
from tests.support.programs import program_of, unit_of
from tests.support.samples import x
from tspc.ir.program import APART, FOLD, Node, Ref
from tspc.passes.analyse.fold import Fold, added_once, outline, summand
from tspc.passes.lower.unit import Unit

aten, tspc = torch.ops.aten, torch.ops.tspc
Tensor = torch.Tensor
linear = aten.linear.default
TOKENS = x(2, 8, 4)


@cases("fold")
def test_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)


def folded(fn: Callable[..., Any], *tensors: Tensor, **params: Tensor) -> Unit:
    return unit_of(program_of(fn, *tensors, params=params), "fold")


def the_fold(u: Unit) -> Fold:
    (node,) = (n for n in u.program.nodes if n.op == FOLD)
    return node.kwargs["fold"]


def biased(t: Tensor, up: Tensor, b: Tensor, down: Tensor, c: Tensor) -> Tensor:
    return linear(linear(t, up, b).relu(), down, c).square().mean()


def test_a_bias_after_the_sum_is_added_once() -> None:
    u = folded(biased, TOKENS, up=x(6, 4), b=x(6), down=x(4, 6), c=x(4))
    fold = the_fold(u)
    assert set(fold.weights) == {"up", "down"} and fold.sliced == (Ref("b"),)
    assert (fold.size, fold.units, fold.tokens) == (6, 3, (Ref("x0"),))
    (added,) = (n for n in u.program.nodes if n.op == aten.add.Tensor)
    assert added.refs() == [Ref("fold_0", 0), Ref("c")]
    assert [e.kind for e in fold.exits] == ["sum"]


def test_what_leaves_in_pieces_is_stacked() -> None:
    def fn(t: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        inner = linear(t, up).relu()
        return linear(inner, down).square().mean(), inner

    fold = the_fold(folded(fn, TOKENS, up=x(6, 4), down=x(4, 6)))
    assert sorted(e.kind for e in fold.exits) == ["stack", "sum"]


def test_logarithms_are_merged() -> None:
    def fn(t: Tensor, head: Tensor) -> Tensor:
        return aten.logsumexp.default(linear(t, head), [-1]).mean()

    assert [e.kind for e in the_fold(folded(fn, TOKENS, head=x(12, 4))).exits] == ["lse"]


def test_what_the_factor_does_not_touch_is_made_apart() -> None:
    def fn(t: Tensor, fused: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = aten.split_with_sizes.default(linear(t, fused), [12, 4, 4], 2)
        q = aten.transpose.int(aten.view.default(q, [2, 8, 3, 4]), 1, 2)
        k, v = (aten.expand.default(y.unsqueeze(1), [2, 3, 8, 4]) for y in (k, v))
        y = tspc.scaled_dot_product_attention.default(q, k, v, causal=True)
        y = aten.reshape.default(aten.transpose.int(y, 1, 2), [2, 8, 12])
        return linear(y, out).square().mean(), k.sum()

    u = folded(fn, TOKENS, fused=x(20, 4), out=x(4, 12))
    (apart,) = (n for n in u.program.nodes if n.op == APART)
    fold: Fold = apart.kwargs["fold"]
    assert fold.weights == ("fused",) and {e.kind for e in fold.exits} == {APART}
    assert the_fold(u).apart == fold.exits


def test_weights_of_which_only_a_cast_is_read_are_cast_before() -> None:
    def fn(t: Tensor, up: Tensor, down: Tensor) -> Tensor:
        narrow = aten.to.dtype(up, torch.float32)
        inner = linear(aten.to.dtype(t, torch.float32), narrow).relu()
        return linear(inner, aten.to.dtype(down, torch.float32)).square().mean()

    fold = the_fold(folded(fn, TOKENS, up=x(6, 4), down=x(4, 6)))
    assert fold.casts == {"up": torch.float32, "down": torch.float32}
    assert not any(n.op == aten.to.dtype for n in fold.body)


def test_outputs_that_no_gradient_comes_from() -> None:
    def fn(t: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        inner = linear(t, up).relu()
        return linear(inner, down).square().mean(), inner

    program = program_of(fn, TOKENS, params={"up": x(6, 4), "down": x(4, 6)})
    u = unit_of(program, "choose")
    leaves = frozenset(u.choice.leaves)
    grads = []
    for differentiable in (True, False):
        after = outline(u.analysis, u.choice.regions, leaves, 2, differentiable)
        (node,) = (n for n in after.nodes if n.op == FOLD)
        grads.append([e.type.requires_grad for e in node.kwargs["fold"].exits if e.kind == "stack"])
    assert grads == [[True], [False]]


def test_one_checkpointed_part_is_a_group() -> None:
    from dataclasses import replace

    program = program_of(biased, TOKENS, params=dict(up=x(6, 4), b=x(6), down=x(4, 6), c=x(4)))
    grouped = replace(
        program, nodes=tuple(replace(n, recompute=3 if n.is_call else 0) for n in program.nodes)
    )
    assert the_fold(unit_of(grouped, "fold")).recompute == 3
    assert the_fold(unit_of(program, "fold")).recompute == 0


def test_the_summand_of_an_op() -> None:
    a, b, c = Ref("a"), Ref("b"), Ref("c")
    biased = Node("y", linear, (a, b, c))
    assert added_once(biased) == c and summand(biased).args == (a, b)
    plain = Node("y", linear, (a, b))
    assert added_once(plain) is None and summand(plain) is plain
    for op, alone in ((aten.addmm.default, aten.mm), (aten.baddbmm.default, aten.bmm)):
        node = Node("y", op, (c, a, b), {"beta": 1})
        assert added_once(node) == c
        assert (summand(node).op, summand(node).args) == (alone.default, (a, b))
        assert summand(node).kwargs == {}
