"""Kinds of ops: each list has ops of its kind, told apart by what they do to a small tensor."""

from __future__ import annotations

import pytest
import torch

from tspc.ir import kinds
from tspc.ops.sequence import SEQUENCE_CONV

X = torch.arange(6, dtype=torch.float64).view(2, 3)


def test_conversions_are_words_of_their_own() -> None:
    assert len(set(kinds.CONVERSIONS)) == len(kinds.CONVERSIONS) == 8
    assert {kinds.LOCAL, kinds.WHOLE, kinds.VARY, kinds.CLEAR} < set(kinds.CONVERSIONS)


@pytest.mark.parametrize("op", kinds.PADS, ids=str)
def test_pads_lay_a_constant_beside(op: torch._ops.OpOverload) -> None:
    assert op(X, [1, 0])[:, 0].tolist() == [0, 0]


def test_sums_and_means_along_dims_and_of_all() -> None:
    assert kinds.SUMS[0](X, [1]).tolist() == [3, 12] and kinds.SUMS[1](X).item() == 15
    assert kinds.MEANS[0](X, [1]).tolist() == [1, 4] and kinds.MEANS[1](X).item() == 2.5


def test_contractions_are_products_of_matrices() -> None:
    a, b = X[None], X.T[None].contiguous()
    operands = {
        "linear": (X, X),
        "addmm": (torch.zeros(2, 2, dtype=X.dtype), X, X.T),
        "baddbmm": (torch.zeros(1, 2, 2, dtype=X.dtype), a, b),
        "mm": (X, X.T),
        "bmm": (a, b),
        "matmul": (X, X.T),
        "einsum": ("ij,kj->ik", [X, X]),
    }
    for op in kinds.CONTRACTIONS:
        assert torch.equal(op(*operands[op._opname]).view(2, 2), X @ X.T), op
    assert len(operands) == len(kinds.CONTRACTIONS)


def test_ops_along_a_sequence_by_role() -> None:
    assert SEQUENCE_CONV in kinds.ALONG["halo"] and set(kinds.PADS) < kinds.ALONG["halo"]
    assert kinds.ALONG["scan"] == {torch.ops.aten.cumsum.default}
