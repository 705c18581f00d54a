"""A program with conversions: which sequence dims have, and those of a fold."""

from __future__ import annotations

import torch

from tests.support.programs import program_of, unit_of
from tests.support.samples import x
from tspc.ir.program import FOLD
from tspc.passes.analyse.typed import Typed, sequence_of

aten = torch.ops.aten
Tensor = torch.Tensor


def mlp(tokens: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return aten.linear.default(aten.linear.default(tokens, up).relu(), down).square().mean()


def typed() -> Typed:
    params = {"up": x(6, 4), "down": x(4, 6)}
    return unit_of(program_of(mlp, x(2, 8, 4), params=params), "propagate").typed


def test_the_main_sequence_and_which_one_dims_have() -> None:
    t = typed()
    assert t.leaf is not None and t.leaf.size == 8 and t.leaves == (t.leaf,)
    assert t.sequence(t.dims["x0", 0]) == 0 and t.sequence(t.dims["up", 0]) is None
    other = t.factors.new(3)
    assert sequence_of(t.factors, (other, t.leaf), t.dims["x0", 0]) == 1
    assert Typed(t.program, t.factors, {}, {}, {}, ()).leaf is None


def test_sequences_of_a_fold() -> None:
    t = typed()
    (fold,) = (n.kwargs["fold"] for n in t.program.nodes if n.op == FOLD)
    assert t.sequences_of(fold) == [0]
