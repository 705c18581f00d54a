"""Ops along the sequence in one form: convolutions with their pads, rows that are moved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.support.programs import agree, inputs, ops, program_of
from tests.support.samples import x
from tspc.ir.builder import Builder
from tspc.ops.sequence import SEQUENCE_CONV
from tspc.passes.rewrite.normalize import normalize
from tspc.passes.rewrite.sequence_ops import canonical

aten = torch.ops.aten
Tensor = torch.Tensor
SEQ, W, ALONE, ROW = x(2, 3, 9), x(5, 3, 4), x(3, 1, 4), x(5, 3, 1)
CONV = "tspc.sequence_conv"


def conv(a: Tensor, w: Tensor, padding: int = 0, dilation: int = 1, groups: int = 1) -> Tensor:
    return aten.conv1d.default(a, w, None, [1], [padding], [dilation], groups)


def behind(a: Tensor, w: Tensor) -> Tensor:
    return conv(a, w, 3)[:, :, :9]


FORMS: dict[str, tuple[Callable[..., Tensor], Tensor, list[str]]] = {
    "zeros in front": (lambda a, w: conv(F.pad(a, (3, 0)), w), W, [CONV]),
    "zeros around": (lambda a, w: conv(F.pad(a, (2, 1)), w), W, [CONV]),
    "what is behind is left out": (behind, W, [CONV]),
    "dilated": (lambda a, w: conv(F.pad(a, (6, 0)), w, 0, 2), W, [CONV]),
    "each channel alone": (lambda a, w: conv(F.pad(a, (3, 0)), w, 0, 1, 3), ALONE, [CONV]),
    "same": (lambda a, w: aten.conv1d.padding(a, w, None, [1], "same"), x(5, 3, 3), [CONV]),
    "of one row": (
        lambda a, w: conv(a, w),
        ROW,
        ["transpose.int", "view", "linear", "transpose.int"],
    ),
    "that is shorter": (lambda a, w: conv(a, w), W, ["conv1d"]),
    "with steps": (lambda a, w: aten.conv1d.default(a, w, None, [2], [4]), W, ["conv1d"]),
    "beside other pads": (
        lambda a, w: conv(F.pad(a, (3, 0), value=1.0), w),
        W,
        ["pad", "conv1d"],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_convolution(name: str) -> None:
    fn, weight, wanted = FORMS[name]
    program = program_of(fn, SEQ, weight)
    after = normalize(program)
    assert [o for o in ops(after) if o != "slice.Tensor"] == wanted
    agree(program, after, **inputs(SEQ, weight))


def test_groups_of_one_channel_are_zero_groups() -> None:
    fn, weight, _ = FORMS["each channel alone"]
    (node,) = (n for n in normalize(program_of(fn, SEQ, weight)).nodes if n.op == SEQUENCE_CONV)
    assert node.args[3:] == (3, 1, 0)


A = x(3, 9, 4)
MOVES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...] | None]] = {
    "later by a pad": (lambda a: F.pad(a[:, :-2], (0, 0, 2, 0)), (0, 0, 2, -2)),
    "earlier by a pad": (lambda a: F.pad(a[:, 1:], (0, 0, 0, 1)), (0, 0, -1, 1)),
    "later beside zeros": (
        lambda a: torch.cat([torch.zeros_like(a[:, :2]), a[:, :-2]], 1),
        (0, 0, 2, -2),
    ),
    "earlier beside zeros": (
        lambda a: torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1),
        (0, 0, -1, 1),
    ),
    "beside ones": (lambda a: torch.cat([torch.ones_like(a[:, :1]), a[:, :-1]], 1), None),
    "longer than before": (lambda a: F.pad(a[:, :-1], (0, 0, 2, 0)), None),
    "of another length": (lambda a: torch.cat([torch.zeros_like(a[:, :1]), a[:, :-2]], 1), None),
}


@pytest.mark.parametrize("name", MOVES)
def test_moved_rows_are_a_pad_that_cuts(name: str) -> None:
    fn, pad = MOVES[name]
    program = program_of(fn, A)
    after = normalize(program)
    last = [n for n in after.nodes if n.is_call][-1]
    if pad is None:
        assert last.op in (aten.cat.default, aten.pad.default)
    else:
        assert last.refs()[0].name == "x0" and tuple(last.args[1]) == pad
    agree(program, after, **inputs(A))


def test_differences_are_the_later_less_the_earlier() -> None:
    program = program_of(lambda a: torch.diff(a, dim=1), A)
    after = normalize(program)
    assert ops(after) == ["slice.Tensor", "slice.Tensor", "sub.Tensor"]
    agree(program, after, **inputs(A))
    second = program_of(lambda a: torch.diff(a, 2, dim=1), A)
    assert ops(normalize(second)) == ["diff"]


def test_another_op_is_as_it_is() -> None:
    program = program_of(lambda a: a.sin(), A)
    b = Builder({n.name: n for n in program.nodes})
    (node,) = (n for n in program.nodes if n.is_call)
    assert canonical(b, node) == node and not b.nodes
