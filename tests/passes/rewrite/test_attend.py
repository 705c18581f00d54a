"""Attention that is written out becomes one op: from text to text, and in all its forms with the
same values; what only looks like it stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.goldens import cases, check
from tests.support.programs import agree, inputs, ops, program_of
from tests.support.samples import x
from tspc.ops.attention import ATTENTION, bound
from tspc.passes.rewrite.attend import find_attention
from tspc.passes.rewrite.normalize import normalize

Tensor = torch.Tensor
Q, K, V = x(2, 3, 5, 4), x(2, 3, 5, 4), x(2, 3, 5, 6)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()


@cases("attend")
def test_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def with_sinks(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    both = torch.cat([scores(q, k), s.view(1, -1, 1, 1).expand(2, 3, 5, 1)], -1)
    both = both - both.max(-1, keepdim=True).values
    return both.softmax(-1)[..., :-1] @ v


def by_letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)).softmax(-1)
    return torch.einsum("bhqk,bkhe->bqhe", weights, v.transpose(1, 2))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(5)
    gone = at[:, None] < at[None]
    return scores(q, k).masked_fill(gone, -math.inf).softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(5)
    return torch.where(at[:, None] >= at[None], scores(q, k), -1e30).softmax(-1) @ v


# function of q, k, v and others -> (others, fields of the op)
FORMS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], dict[str, Any]]] = {
    "plain": (lambda q, k, v: scores(q, k).softmax(-1) @ v, (), {"scale": 1.0}),
    "scaled": (lambda q, k, v: (scores(q, k) / 2).softmax(-1) @ v, (), {"scale": 0.5}),
    "scaled queries": (lambda q, k, v: scores(q * 0.5, k).softmax(-1) @ v, (), {}),
    "capped": (
        lambda q, k, v: (torch.tanh(scores(q, k) / 5) * 5).softmax(-1) @ v,
        (),
        {"fill": -math.inf},
    ),
    "a mask added": (
        lambda q, k, v, m: (scores(q, k) + m).softmax(-1) @ v,
        (x(2, 1, 5, 5),),
        {"scale": 1.0, "fill": -math.inf},
    ),
    "filled": (causal, (), {"fill": -math.inf}),
    "chosen": (chosen, (), {"fill": -math.inf}),
    "sinks": (with_sinks, (x(3),), {"scale": 1.0}),
    "einsum": (by_letters, (), {"scale": 1.0}),
    "cast": (
        lambda q, k, v: scores(q, k).to(torch.float64).softmax(-1).to(torch.float64) @ v,
        (),
        {"scale": 1.0},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_becomes_one_op(name: str) -> None:
    fn, others, fields = FORMS[name]
    program = normalize(program_of(fn, Q, K, V, *others))
    after = find_attention(program)
    (node,) = (n for n in after.nodes if n.op == ATTENTION)
    assert not {"softmax.int", "matmul", "einsum"} & set(ops(after))
    _, spec = bound(node)
    assert {n: getattr(spec, n) for n in fields} == fields
    agree(program, after, 1e-9, **inputs(Q, K, V, *others))


def test_of_three_dims_it_has_one_head() -> None:
    tensors = (Q[:, 0], K[:, 0], V[:, 0])
    program = normalize(program_of(FORMS["plain"][0], *tensors))
    after = find_attention(program)
    assert "tspc.scaled_dot_product_attention" in ops(after)
    agree(program, after, 1e-9, **inputs(*tensors))


def test_dropped_weights_are_a_field() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten.dropout.default(scores(q, k).softmax(-1), 0.25, True) @ v

    (node,) = (
        n for n in find_attention(normalize(program_of(fn, Q, K, V))).nodes if n.op == ATTENTION
    )
    assert bound(node)[1].dropout == 0.25


STAYS: dict[str, Callable[..., Any]] = {
    "a softmax over queries": lambda q, k, v: scores(q, k).softmax(-2) @ v,
    "weights that are read": lambda q, k, v: (scores(q, k).softmax(-1) @ v, scores(q, k)[0] * 0),
    "scores of one operand": lambda q, k, v: k.softmax(-1) @ v[..., :4, :],
    "squared weights": lambda q, k, v: scores(q, k).softmax(-1).square() @ v,
}


@pytest.mark.parametrize("name", STAYS)
def test_what_only_looks_like_it_stays(name: str) -> None:
    program = normalize(program_of(STAYS[name], Q, K, V))
    after = find_attention(program)
    if name != "weights that are read":
        assert "softmax.int" in ops(after)
    agree(program, after, 1e-9, **inputs(Q, K, V))


def test_a_refused_product_stays() -> None:
    program = normalize(program_of(FORMS["plain"][0], Q, K, V))
    (last,) = program.output.refs()
    assert ops(find_attention(program, {last.name})) == ops(program)
