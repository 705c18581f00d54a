"""Random numbers for stored tensors: from the first rank's generator, which goes on."""

from __future__ import annotations

import torch

from tests.support.group import alone
from tspc.runtime.params.noise import ignores_values, of_first_rank

aten = torch.ops.aten


def test_ops_that_look_at_shapes_only() -> None:
    for op in (aten.rand_like.default, aten.uniform_.default, aten.normal_.default):
        assert ignores_values(op)
    assert ignores_values(aten.bernoulli_.float)
    for op in (aten.bernoulli.default, aten.multinomial.default, aten.native_dropout.default):
        assert not ignores_values(op)


def test_a_generator_that_stands_alike_goes_on() -> None:
    with alone() as mesh:
        torch.manual_seed(3)
        wanted = torch.rand(2), torch.rand(2)
        torch.manual_seed(3)
        with of_first_rank(mesh, None):
            first = torch.rand(2)
        assert torch.equal(first, wanted[0]) and torch.equal(torch.rand(2), wanted[1])


def test_a_given_generator_is_used_as_it_is() -> None:
    with alone() as mesh:
        torch.manual_seed(3)
        before = torch.get_rng_state()
        with of_first_rank(mesh, torch.Generator()):
            assert torch.equal(torch.get_rng_state(), before)


def test_another_generator_is_set_back(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """As on a rank that stands elsewhere than the first."""
    with alone() as mesh:
        torch.manual_seed(3)
        elsewhere = torch.random.get_rng_state()
        torch.manual_seed(5)
        monkeypatch.setattr(torch.distributed, "broadcast", lambda x, *_, **__: x.copy_(elsewhere))
        before = torch.get_rng_state()
        with of_first_rank(mesh, None):
            assert torch.equal(torch.get_rng_state(), elsewhere)
        assert torch.equal(torch.get_rng_state(), before)
