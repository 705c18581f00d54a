"""Dims that ops lay together and attention reads as one are sequences of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.programs import program_of
from tests.support.samples import x
from tspc.factors.factor import Factor
from tspc.passes.analyse.factorize import Analysis, factorize
from tspc.passes.analyse.seal import analyse

aten, tspc = torch.ops.aten, torch.ops.tspc
Tensor = torch.Tensor


def attend(a: Tensor) -> Tensor:
    return tspc.scaled_dot_product_attention.default(a, a, a)


def joined(a: Tensor, token: Tensor) -> Tensor:
    """A token laid in front."""
    return attend(aten.cat.default([token, a], 2))


def flattened(a: Tensor) -> Tensor:
    """Rows and columns as one dim."""
    return attend(aten.view.default(a, [2, 3, 20, 4]))


CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
    "joined": (joined, (x(2, 3, 5, 4), x(2, 3, 1, 4)), 6),
    "flattened": (flattened, (x(2, 3, 4, 5, 4),), 20),
}


def queries(a: Analysis) -> tuple[Factor, ...]:
    (r,) = (r for r in a.records if "attention" in str(r.node.op))
    return a.F.expand(tuple(r.ins[0][-2]))


@pytest.mark.parametrize("name", CASES)
def test_a_dim_of_several_factors_is_sealed(name: str) -> None:
    fn, tensors, size = CASES[name]
    program = program_of(fn, *tensors)
    (f,) = queries(analyse(program))
    assert f.size == size and not f.cat and f.origin != ""
    before = queries(factorize(program))
    assert len(before) > 1 or before[0].cat
    sealed = dict(analyse(program).sealed)
    assert list(sealed.values()) == [((0, 2),)]


def test_a_plain_sequence_is_not() -> None:
    assert not analyse(program_of(attend, x(2, 3, 5, 4))).sealed


def test_refused_ops_are_handed_on() -> None:
    program = program_of(lambda a: attend(a.sin()), x(2, 3, 5, 4))
    name = next(n.name for n in program.nodes if n.op == aten.sin.default)
    (record, *_) = analyse(program, {name}).records
    assert {role for roles in record.roles.values() for role, *_ in roles} == {"whole"}
