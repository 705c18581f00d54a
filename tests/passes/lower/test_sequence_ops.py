"""Ops along the sequence on ranks: as on one device, with rows of the neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.programs import analysis_of, program_of, run_local, unit_of
from tests.support.ranks import AXIS
from tspc.base.options import parse
from tspc.ir.program import OUTPUT
from tspc.passes.lower.sequence_ops import runs

Tensor = torch.Tensor
OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "convolution": lambda x, w: F.conv1d(F.pad(x.mT, (2, 0)), w.view(6, 1, 3), groups=6).mT,
    "running sum": lambda x, w: x.cumsum(1),
    "flip": lambda x, w: x.flip(1),
    "flip of two dims": lambda x, w: x.flip(1, 2),
    "roll": lambda x, w: x.roll((1, 2), (1, 2)),
    "shift": lambda x, w: F.pad(x, (0, 0, 1, -1)),
    "shift of two dims": lambda x, w: F.pad(x, (1, 0, 1, -1)),
}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", OPS)
def test_as_on_one_device(name: str, layout: str) -> None:
    def fn(x: Tensor, w: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
        return [OPS[name](x + torch.tanh(x @ up) @ down, w)]

    torch.manual_seed(0)
    x, w = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    weights = [torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)]
    names = {"w": w, "m.up": weights[0], "m.down": weights[1]}
    options = parse({"layout": layout})
    unit = unit_of(program_of(fn, x, params=names), "localize", 2, axis=AXIS, options=options)
    assert unit.choice.leaf is not None
    for (got,) in run_local(unit, x, *names.values()):
        torch.testing.assert_close(got, fn(x, w, *weights)[0])


def along(fn: Callable[..., Any], dim: int) -> bool:
    x = torch.zeros(2, 6, 4)
    a = analysis_of(lambda x, y: [fn(x, y)], x, x.clone())
    r = [r for r in a.records if r.node.op != OUTPUT][-1]
    (leaf,) = a.F.expand(tuple(a.env["x0", 0][dim]))
    return runs(a.F, r, [leaf])


def test_what_runs_along_a_dim() -> None:
    assert along(lambda x, y: x.cumsum(1), 1) and not along(lambda x, y: x.cumsum(1), 2)
    assert not along(lambda x, y: x.tanh(), 1) and not along(lambda x, y: x.sum(1), 1)
    assert along(lambda x, y: x.flip(1), 1)
    assert not along(lambda x, y: F.conv1d(x, y[..., :3]), 2)
    a = analysis_of(lambda x: [x], torch.zeros(2))
    assert not runs(a.F, None, [])
