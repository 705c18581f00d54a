"""Regions that no order can run: what leaves one leads back into it."""

from __future__ import annotations

import torch

from tests.support.programs import analysis_of
from tests.support.samples import x
from tspc.factors.factor import Factors
from tspc.passes.analyse.cycles import entangled
from tspc.passes.analyse.regions import Region

Tensor = torch.Tensor


def chain(a: Tensor) -> Tensor:
    return a.sin().cos().exp().tanh()


def region(*ops: int) -> Region:
    return Region(Factors().new(2), [], set(ops))


def test_a_path_that_leads_back() -> None:
    records = analysis_of(chain, x(3)).records
    around, inside, after = region(0, 2), region(1), region(3)
    assert entangled(records, [around, inside, after]) == [around, inside]
    assert entangled(records, [around]) == [around]


def test_one_after_the_other_is_no_cycle() -> None:
    records = analysis_of(chain, x(3)).records
    assert entangled(records, [region(0, 1), region(2, 3)]) == []


def test_what_both_make_is_no_cycle() -> None:
    """An op that is recomputed in two regions."""
    records = analysis_of(lambda a: a.sin().cos() + a.sin().exp(), x(3)).records
    names = [r.node.op._opname for r in records[:-1]]
    assert names == ["sin", "cos", "sin", "exp", "add"]
    assert entangled(records, [region(0, 1), region(0, 2, 3)]) == []
