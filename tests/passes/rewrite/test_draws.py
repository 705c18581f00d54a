"""Random ops as functions of a seed and of positions: from text to text, and each in its
distribution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.goldens import cases, check
from tests.support.programs import inputs, ops, program_of, results
from tests.support.samples import x
from tspc.base.errors import UnsupportedError
from tspc.ir.program import SEED
from tspc.ops.attention import ATTENTION
from tspc.passes.rewrite.draws import draw_by_counter

aten = torch.ops.aten
Tensor = torch.Tensor
A = torch.ones(40, 50, dtype=torch.float64)


@cases("draws")
def test_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)


# function -> (mean, standard deviation, least, greatest) of what it draws
DRAWS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float, float, float]]] = {
    "dropout": (lambda a: aten.dropout.default(a, 0.25, True), (1, 0.577, 0, 4 / 3)),
    "rand": (lambda a: torch.rand(40, 50) + a * 0, (0.5, 0.289, 0, 1)),
    "rand_like": (lambda a: torch.rand_like(a), (0.5, 0.289, 0, 1)),
    "randn": (lambda a: torch.randn(40, 50) + a * 0, (0, 1, -6, 6)),
    "randn_like": (lambda a: torch.randn_like(a), (0, 1, -6, 6)),
    "bernoulli": (lambda a: aten.bernoulli.default(a * 0.3), (0.3, 0.458, 0, 1)),
    "bernoulli of a number": (lambda a: aten.bernoulli.p(a, 0.3), (0.3, 0.458, 0, 1)),
    "uniform": (lambda a: aten.uniform.default(a, 2.0, 4.0), (3, 0.577, 2, 4)),
    "exponential": (lambda a: aten.exponential.default(a, 2.0), (0.5, 0.5, 0, 9)),
    "normal": (lambda a: aten.normal_functional.default(a, 1.0, 2.0), (1, 2, -12, 12)),
    "normal of tensors": (lambda a: aten.normal.Tensor_Tensor(a * 3, a * 2), (3, 2, -10, 16)),
    "randint": (lambda a: torch.randint(2, 6, (40, 50)) + a * 0, (3.5, 1.118, 2, 5)),
    "randint_like": (lambda a: torch.randint_like(a, 4), (1.5, 1.118, 0, 3)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_has_its_distribution(name: str) -> None:
    fn, (mean, deviation, least, greatest) = DRAWS[name]
    after = draw_by_counter(program_of(fn, A))
    assert SEED in {n.name for n in after.nodes} and any("tspc." in o for o in ops(after))
    (drawn,), (again,) = results(after, x0=A), results(after, x0=A)
    assert torch.equal(drawn, again) and drawn.shape == A.shape
    drawn = drawn.double()
    assert drawn.mean().item() == pytest.approx(mean, abs=0.1 * max(deviation, 1))
    assert drawn.std().item() == pytest.approx(deviation, rel=0.1)
    assert least <= drawn.min() and drawn.max() <= greatest


def test_types_are_those_of_torchs_ops() -> None:
    for fn, _ in DRAWS.values():
        before = program_of(fn, A)
        assert draw_by_counter(before).output.refs() == before.output.refs()
        (now,), (was,) = results(draw_by_counter(before), x0=A), results(before, x0=A)
        assert now.dtype == was.dtype


def test_a_permutation_has_each_once() -> None:
    after = draw_by_counter(program_of(lambda a: torch.randperm(50) + a[0].long() * 0, A))
    (drawn,) = results(after, x0=A)
    assert sorted(drawn.tolist()) == list(range(50)) and drawn.tolist() != list(range(50))


def test_two_draws_differ() -> None:
    after = draw_by_counter(program_of(lambda a: (torch.rand_like(a), torch.rand_like(a)), A))
    first, second = results(after, x0=A)
    assert not torch.equal(first, second)


def test_dropped_keys_have_states() -> None:
    q = x(2, 3, 5, 4)
    program = program_of(lambda a: ATTENTION(a, a, a, dropout=0.5), q)
    after = draw_by_counter(program)
    assert "tspc.query_states" in ops(after)
    (node,) = (n for n in after.nodes if n.op == ATTENTION)
    assert node.args[3] is None and node.args[4] is not None
    assert results(after, **inputs(q))[0].shape == q.shape


def test_dropout_that_drops_nothing_goes() -> None:
    for fn in (
        lambda a: aten.dropout.default(a, 0.5, False).sin(),
        lambda a: aten.dropout.default(a, 0.0, True).sin(),
    ):
        after = draw_by_counter(program_of(fn, A))
        assert ops(after) == ["sin"] and SEED not in {n.name for n in after.nodes}


@pytest.mark.parametrize(
    "fn",
    [
        lambda a: aten.multinomial.default(a, 1),
        lambda a: aten.rrelu.default(a, 0.1, 0.3, True),
        lambda a: torch.rand(40, 50, dtype=torch.complex64) + a,
    ],
)
def test_a_draw_that_ranks_cannot_share(fn: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="draws random numbers that the ranks cannot share"):
        draw_by_counter(program_of(fn, A))


def test_rrelu_that_draws_nothing_stays() -> None:
    program = program_of(lambda a: aten.rrelu.default(a, 0.1, 0.3, False), A)
    assert draw_by_counter(program) == program
