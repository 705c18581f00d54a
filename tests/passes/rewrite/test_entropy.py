"""The cross-entropy spelled out gives what torch's gives, in all its forms."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F

from tests.support.programs import agree, inputs, ops, program_of
from tests.support.samples import ids, x
from tspc.passes.rewrite import entropy
from tspc.passes.rewrite.normalize import normalize

Tensor = torch.Tensor
LABELS = ids(5, 7)
LABELS[2] = -100
FORMS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"ignore_index": 3},
    {"label_smoothing": 0.2},
    {"label_smoothing": 0.2, "reduction": "sum"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_of_rows(form: dict[str, Any]) -> None:
    labels = LABELS.clamp(min=0) if "ignore_index" in form else LABELS
    program = program_of(lambda a, i: F.cross_entropy(a, i, **form), x(7, 5), labels)
    after = normalize(program)
    assert "cross_entropy_loss" not in ops(after) and "tspc.pick" in ops(after)
    agree(program, after, **inputs(x(7, 5), labels))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weighted_classes(reduction: str) -> None:
    program = program_of(
        lambda a, i, w: F.cross_entropy(a, i, w, reduction=reduction), x(7, 5), LABELS, x(5).abs()
    )
    after = normalize(program)
    assert "tspc.pick" in ops(after)
    agree(program, after, **inputs(x(7, 5), LABELS, x(5).abs()))


def test_classes_in_the_second_dim() -> None:
    program = program_of(lambda a, i: F.cross_entropy(a, i), x(2, 5, 3, 4), ids(5, 2, 3, 4))
    after = normalize(program)
    assert ops(after)[0] == "permute"
    agree(program, after, **inputs(x(2, 5, 3, 4), ids(5, 2, 3, 4)))


def test_one_row_alone() -> None:
    program = program_of(lambda a, i: F.cross_entropy(a, i), x(5), ids(5, 1)[0])
    agree(program, normalize(program), **inputs(x(5), torch.tensor(3)))


@pytest.mark.parametrize("form", ["probabilities", "weights and smoothing"])
def test_other_forms_stay(form: str) -> None:
    def fn(a: Tensor, other: Tensor) -> Tensor:
        if form == "probabilities":
            return F.cross_entropy(a, other)
        return F.cross_entropy(a, LABELS, other, label_smoothing=0.1)

    other = x(7, 5).softmax(-1) if form == "probabilities" else x(5).abs()
    assert "cross_entropy_loss" in ops(normalize(program_of(fn, x(7, 5), other)))


def test_the_weight_of_each_class() -> None:
    """Of label smoothing: the share of all classes together, over symbols too."""
    n = sympy.Symbol("n", positive=True, integer=True)
    assert entropy._ratio(0.5, 4) == 0.125
    assert entropy._ratio(0.5, n).subs(n, 4) == 0.125  # type: ignore[union-attr]
