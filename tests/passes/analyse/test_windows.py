"""Ranges of a sequence are computed on all of it: from text to text, and with the same values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.goldens import cases, check
from tests.support.programs import agree, inputs, ops, program_of
from tests.support.samples import x
from tspc.passes.analyse.factorize import factorize
from tspc.passes.analyse.sequence import sequences
from tspc.passes.analyse.windows import Window, widen

aten = torch.ops.aten
Tensor = torch.Tensor
linear = aten.linear.default
TOKENS = x(2, 8, 4)


@cases("windows")
def test_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)


def later(t: Tensor, w: Tensor) -> Tensor:
    return linear(t, w)[:, 1:].relu().sum()


def mean(t: Tensor, w: Tensor) -> Tensor:
    return linear(t, w)[:, 1:-1].mean([1, 2])


def shifted(t: Tensor, w: Tensor) -> Tensor:
    y = linear(t, w)
    return (y[:, 1:] * y[:, :-1]).sum()


def first(t: Tensor, w: Tensor) -> Tensor:
    return linear(t, w)[:, 0] * 2


def last(t: Tensor, w: Tensor) -> Tensor:
    return linear(t, w)[:, -1:] * 2


def flat(t: Tensor, w: Tensor) -> Tensor:
    """Batch and range as one dim, beside what has no sequence of its own."""
    y = aten.reshape.default(linear(t, w)[:, :-1], [14, 6])
    return (y * torch.arange(14.0, dtype=y.dtype)[:, None].reshape(14, 1)).sum()


def positions(t: Tensor, w: Tensor) -> Tensor:
    """A replicated value of the range."""
    y = linear(t, w)[:, 1:]
    return (y * torch.arange(7.0, dtype=y.dtype)[None, :, None]).sum()


def sorted_range(t: Tensor, w: Tensor) -> Tensor:
    """What needs the range itself gets it."""
    return aten.sort.default(linear(t, w)[:, 1:].relu(), 1)[0]


# function -> whether an op of it makes the range
FORMS: dict[Callable[..., Tensor], bool] = {
    later: False,
    mean: False,
    shifted: False,
    first: False,
    last: False,
    flat: False,
    positions: False,
    sorted_range: True,
}


@pytest.mark.parametrize("fn", FORMS, ids=lambda f: f.__name__)
def test_a_range_has_the_values_of_the_range(fn: Callable[..., Tensor]) -> None:
    weight = x(6, 4)
    program = program_of(fn, TOKENS, params={"w": weight})
    a = factorize(program)
    (leaf,) = sequences(a)
    after = widen(a, leaf)
    assert ("slice.Tensor" in ops(after)) >= FORMS[fn]
    if fn in (later, mean, first, last):
        assert not {"slice.Tensor", "select.int"} & set(ops(after))
    assert ops(after) != ops(program)
    agree(program, after, 1e-12, **inputs(TOKENS), w=weight)


def test_without_a_sequence_nothing_is_done() -> None:
    program = program_of(later, TOKENS, params={"w": x(6, 4)})
    assert widen(factorize(program), None) is program


def test_what_is_refused_reads_the_range() -> None:
    program = program_of(later, TOKENS, params={"w": x(6, 4)})
    (name,) = (n.name for n in program.nodes if n.op == aten.relu.default)
    a = factorize(program, refused={name})
    after = widen(a, sequences(a)[0])
    assert "slice.Tensor" in ops(after)


def test_a_window_is_data() -> None:
    a = factorize(program_of(later, TOKENS, params={"w": x(6, 4)}))
    leaf = sequences(a)[0]
    assert Window(leaf, 1, 0) == Window(leaf, 1, 0) != Window(leaf, 0, 1)
