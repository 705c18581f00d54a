"""Ids and labels lie in their tables: checked before a call, once where lengths alone say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.programs import program_of
from tspc.base.errors import IndexRangeError
from tspc.ir.program import Program
from tspc.ops.lookup import lookups
from tspc.runtime.call import lookups as module
from tspc.runtime.call.lookups import Indices

Tensor = torch.Tensor
CPU = torch.device("cpu")
TABLE = torch.randn(5, 4, dtype=torch.float64)


def of(fn: Callable[..., Any], *tensors: Tensor) -> Indices:
    return Indices(lookups(program_of(fn, *tensors, params={"table": TABLE})), CPU)


def embedded(i: Tensor, t: Tensor) -> Tensor:
    return F.embedding(i, t)


IDS = torch.tensor([[0, 4], [2, 1]])


def test_ids_in_range_by_their_extremes_at_later_calls() -> None:
    check = of(embedded, IDS)
    assert check({}, {"x0": IDS}) is None and check({}, {"x0": IDS}) is None
    (plan,) = check.plans.values()
    assert plan.ranges == {"x0": (0, 4)} and plan.in_range({"x0": IDS})
    assert not plan.in_range({"x0": IDS + 1}) and not plan.in_range({"x0": "no tensor"})
    many = torch.zeros(1000, dtype=torch.long)
    assert plan.in_range({"x0": many}) and not plan.in_range({"x0": many[:0]})


@pytest.mark.parametrize("value", [-1, 5])
def test_one_that_is_not_is_told_with_its_place(value: int) -> None:
    check = of(embedded, IDS)
    ids = IDS.clone()
    ids[1, 0] = value
    for _ in range(2):
        wrong = check({}, {"x0": ids})
        assert isinstance(wrong, IndexRangeError)
        assert (
            f"embedding in table, which takes 0 to 4, is given {value} on rank 0, at [1, 0] of "
            in (str(wrong))
        )
        assert check({}, {"x0": IDS}) is None


def test_indices_that_a_program_makes() -> None:
    def fn(i: Tensor, t: Tensor) -> Tensor:
        return F.embedding((i.view(4) + 1).clamp(max=4), t) + t[torch.tensor([-5, 1, 2, 3])]

    check = of(fn, IDS)
    assert check({}, {"x0": IDS}) is None
    wrong = check({}, {"x0": IDS - 3})
    assert wrong is not None and "is given -2" in str(wrong) and "made of x0" in str(wrong)


def test_what_hangs_on_lengths_alone_is_checked_once() -> None:
    def fn(x: Tensor, t: Tensor) -> Tensor:
        return x + F.embedding(torch.arange(4), t)

    check = of(fn, torch.randn(4, 4, dtype=torch.float64))
    assert check({}, {"x0": None}) is None
    (plan,) = check.plans.values()
    assert plan.checks == [] and plan.ops == []


def test_large_indices_are_left_to_torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 1)

    def fn(i: Tensor, t: Tensor) -> Tensor:
        return t.index_select(0, i.view(4))

    assert of(fn, IDS)({}, {"x0": IDS + 9}) is None
    assert of(embedded, IDS)({}, {"x0": IDS + 9}) is not None


def test_an_index_that_floats_make_is_checked_while_it_runs() -> None:
    in_range = torch.ops.tspc.in_range.default
    index = torch.tensor([0, 3])
    assert torch.equal(in_range(index, 4, "model.py:1: embedding"), index)
    with pytest.raises(IndexRangeError, match="model.py:1: embedding, which takes 0 to 2, is"):
        in_range(index, 3, "model.py:1: embedding")
    assert in_range(index[:0], 3, "here").numel() == 0


def test_sizes_among_arguments() -> None:
    text = """program 'p'
symbol s positive integer = 3
%table: f64[5, 4] = param()
%x0: i64[s] = input()
%view: i64[s, 1] = aten.view.default(%x0, (s, 1))
%rows: f64[s, 1, 4] = aten.embedding.default(%table, %view)
%output = output(%rows)"""
    program = Program.parse(text)
    check = Indices(lookups(program), CPU)
    (s,) = program.symbols
    assert check({s: 2}, {"x0": torch.tensor([1, 4])}) is None
    assert check({s: 3}, {"x0": torch.tensor([1, 4, 5])}) is not None
