"""Masks of attention become predicates: from text to text, and each kind with the same values."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

from tests.support.goldens import cases, check
from tests.support.programs import agree, inputs, program_of
from tests.support.samples import x
from tspc.ir.program import Node, Type
from tspc.ir.spec import AttentionSpec
from tspc.masks.index import TRUE, Cases, index, nonnegative
from tspc.masks.predicate import K, Q
from tspc.ops.attention import ATTENTION, bound
from tspc.passes.rewrite.masks import as_known, recognise_masks
from tspc.passes.rewrite.normalize import normalize

Tensor = torch.Tensor
N = 6
X = x(2, 3, N, 4)
IDS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 2, 2]])


@cases("masks")
def test_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)


def grid() -> tuple[Tensor, Tensor]:
    at = torch.arange(N)
    return at[:, None], at[None]


def causal(ids: Tensor) -> Tensor:
    q, k = grid()
    return q >= k


def window(ids: Tensor) -> Tensor:
    q, k = grid()
    return (q >= k) & (q - k < 3)


def padding(ids: Tensor) -> Tensor:
    return (ids > 0)[:, None, None, :]


def documents(ids: Tensor) -> Tensor:
    return (ids[:, None, :, None] == ids[:, None, None, :]) & causal(ids)


def added(ids: Tensor) -> Tensor:
    return torch.zeros(N, N, dtype=torch.float64).masked_fill(~causal(ids), -math.inf)


def low(ids: Tensor) -> Tensor:
    return torch.zeros(N, N, dtype=torch.float64).masked_fill(~window(ids), -1e30)


def unread(ids: Tensor) -> Tensor:
    return (ids[:, None, :, None] * ids[:, None, None, :]).cumsum(-1) > 2


def two(ids: Tensor) -> Tensor:
    return added(ids) + torch.zeros(N, N, dtype=torch.float64).masked_fill(
        grid()[0] - grid()[1] > 3, -math.inf
    )


# the mask -> (fields of the op, whether a mask operand is left)
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any], bool]] = {
    "causal": (causal, {"causal": True}, False),
    "window": (window, {"causal": True, "predicate": "(k + 2 >= q)"}, False),
    "documents": (documents, {"causal": True, "predicate": "(d0[k] == d0[q])"}, False),
    "padding": (padding, {}, True),
    "added": (added, {"causal": True, "fill": 0.0}, False),
    "low": (low, {"causal": True, "predicate": "(k + 2 >= q)", "fill": 0.0}, False),
    "two that are added": (two, {"causal": True, "predicate": "(k + 3 >= q)"}, False),
    "unread": (unread, {"predicate": "", "causal": False}, True),
}


def attention(mask: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, ids: ATTENTION(a, a, a, mask(ids))


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_mask(name: str) -> None:
    mask, fields, left = KINDS[name]
    program = normalize(program_of(attention(mask), X, IDS))
    after = recognise_masks(program)
    (node,) = (n for n in after.nodes if n.op == ATTENTION)
    operands, spec = bound(node)
    assert {n: getattr(spec, n) for n in fields} == fields
    assert (operands.mask is not None) == left
    assert (operands.data is not None) == ("d0" in spec.predicate)
    agree(program, after, 1e-9, **inputs(X, IDS))


def test_a_row_without_a_key_shows_the_fill() -> None:
    """A query that sees nothing in a low number has the mean of all values."""

    def strict(ids: Tensor) -> Tensor:
        q, k = grid()
        return torch.zeros(N, N, dtype=torch.float64).masked_fill(k >= q, -1e30)

    program = normalize(program_of(attention(strict), X, IDS))
    after = recognise_masks(program)
    (node,) = (n for n in after.nodes if n.op == ATTENTION)
    assert bound(node)[1] == AttentionSpec(predicate="(q >= k + 1)", fill=-1e30)
    agree(program, after, 1e-9, **inputs(X, IDS))


def test_what_is_refused_keeps_its_mask() -> None:
    program = normalize(program_of(attention(causal), X, IDS))
    (node,) = (n for n in program.nodes if n.op == ATTENTION)
    assert recognise_masks(program, {node.name}) == program.without_dead_nodes()
    plain = program_of(lambda a: a.sin(), X)
    assert recognise_masks(plain) is plain


def test_an_expression_as_a_mask() -> None:
    t, p = Type((N, N), torch.bool), nonnegative(index(0) - index(1))
    known = as_known(p, t)
    assert known is not None and known.predicate == nonnegative(Q - K) and known.is_safe
    strict = as_known(nonnegative(index(0) - index(1) - 1), t)
    assert strict is not None and not strict.is_safe
    floats = Type((N, N), torch.float64)
    filled = as_known(Cases(((0.0, p), (-1e30, sympy.Not(p)))), floats)
    assert filled is not None and filled.fill == -1e30
    assert as_known(Cases(((0.0, p), (-1.0, sympy.Not(p)))), floats) is None
    assert as_known(Cases(((2.0, TRUE),)), floats) is None and as_known(index(0), t) is None
    assert Node("y", "input", types=(t,)).type.shape == (N, N)
