"""Ranges of the sequence are cut from the whole after the program: from text to text, and what is
handed out of a whole value."""

from __future__ import annotations

from pathlib import Path

import pytest
import sympy
import torch

from tests.support.goldens import cases, check
from tests.support.programs import program_of
from tests.support.samples import x
from tspc.passes.analyse.factorize import factorize
from tspc.passes.analyse.outputs import Range, Result, hand_out
from tspc.passes.analyse.sequence import sequences

S = sympy.Symbol("s", positive=True, integer=True)
Tensor = torch.Tensor


@cases("outputs")
def test_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)


def test_a_range_of_a_whole_value() -> None:
    value = torch.arange(20).view(2, 10)
    r = Range(1, 2, S, 3, (2, 3))
    assert torch.equal(r.of(value, lambda e: int(sympy.sympify(e).subs(S, 9))), value[:, 2:9:3])
    assert torch.equal(Range(0, None, None, None, ()).of(value, int), value)  # type: ignore[arg-type]


def test_ranges_are_handed_out_one_after_the_other() -> None:
    value = torch.arange(20).view(2, 10)
    ranges = (Range(1, 2, S, 1, ()), Range(0, 1, 2, 1, ()))
    result = Result("whole", (2, 10), value.dtype, ranges=ranges)
    assert torch.equal(result.given(value, {S: 7}), value[1:2, 2:7])
    assert Result("whole", (), value.dtype).given(value, {}) is value


def test_only_outputs_that_leave_are_handed_out_whole() -> None:
    def fn(t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.ops.aten.linear.default(t, w)
        return y[:, 2:], y.sin()[:, :3]

    program = program_of(fn, x(2, 8, 4), params={"w": x(6, 4)})
    a = factorize(program)
    after, ranges = hand_out(a, set(sequences(a)), 1)
    assert {i: [(r.dim, r.start) for r in rs] for i, rs in ranges.items()} == {0: [(1, 2)]}
    assert after.type_of(after.output.args[0]).shape == (2, 8, 6)
    assert after.output.args[1] == program.output.args[1]
    assert hand_out(a, set(), 2) == (program, {})
