"""What a fold's factor does not touch: on this rank's rows, of the units of one shard."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.programs import Tensor, mlp, mlp_program, unit_of
from tspc.factors.factor import Factors
from tspc.ir.program import APART, Node, Ref
from tspc.passes.analyse.sizes import Sizes
from tspc.passes.lower import run_apart
from tspc.passes.lower.run_apart import run_apart as apart


def test_the_body_on_the_first_units() -> None:
    """A fold as a node that is run apart gives what its shard gives."""
    unit = unit_of(mlp_program(6), "propagate")
    (node,) = unit.folds
    n = Node("apart", APART, node.args, node.kwargs, node.types)
    x, up, down = torch.randn(2, 4, 6), torch.randn(6, 3), torch.randn(3, 6)
    env = dict(zip((r.name for group in node.args for r in group), (x, up, down)))

    def get(r: Ref) -> Tensor:
        return env[r.name]

    (got,) = apart(n, Sizes(unit.typed.factors, {}, {unit.typed.leaves[0]: 4}), get)
    torch.testing.assert_close(got, mlp(x, up, down)[0])


def test_as_many_units_as_a_shard_has() -> None:
    F = Factors()
    h, d, other = F.new(6), F.new(2), F.new(4)
    r, q = Ref("r"), Ref("q")
    fold: Any = type("Fold", (), {})()
    fold.dims, fold.factor, fold.units = {r: [(other,), (h, d)], q: [(d, h)]}, h, 2
    x = torch.arange(48.0).view(4, 12)
    sizes = Sizes(F, {}, {})
    assert torch.equal(run_apart._first_units(fold, r, x, sizes), x[:, :4])
    y = torch.arange(12)
    assert run_apart._first_units(fold, q, y, sizes).tolist() == [0, 1, 6, 7]
