"""Persistent parameters: a shard under its own name, read whole where it is called, moved,
loaded, copied; what a program takes of it, and its gradient back."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.support.group import stored
from tspc.base.errors import UnsupportedError
from tspc.ir.shard import ShardMap
from tspc.runtime.params.storage import Prologue, Taken, default_dim, placed


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 3)
        self.tied = self.up.weight
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def model() -> Mlp:
    torch.manual_seed(0)
    return Mlp().double()


X = torch.randn(2, 3, dtype=torch.float64)


def test_parameters_become_shards_under_their_names() -> None:
    plain = model()
    with stored(model()) as (m, _):
        assert all(isinstance(p, DTensor) for p in m.parameters())
        assert [n for n, _ in m.named_parameters()] == [n for n, _ in plain.named_parameters()]
        assert type(m).__name__ == "Mlp" and isinstance(m, Mlp) and m.tied is m.up.weight
        assert m.up.weight.placements == (Shard(0),) and m.up.bias.placements == (Replicate(),)


def test_which_dim_is_cut() -> None:
    assert default_dim(torch.ones(3, 5)) == 1 and default_dim(torch.ones(())) is None
    assert default_dim(torch.ones(100)) is None and default_dim(torch.ones(1 << 15)) == 0
    assert placed(None) == Replicate() and placed(ShardMap(1, ((0,),), ((True,),))) == Shard(1)


def test_what_a_program_takes_and_gives_back() -> None:
    with stored(model()) as (m, place):
        params = [m.up.weight, m.up.bias, m.down.weight]
        padded = ShardMap(0, ((5, 4, 3, 2, 1, 0, -1),), ((*(True,) * 6, False),))
        elsewhere = ShardMap(0, ((0, 1, 2),), ((True,) * 3,))
        taken = Taken(place, ["w", "b", "d"], [padded, None, elsewhere])
        assert taken.wanted == [Shard(0), Replicate(), Shard(0)]
        w, b, d = Prologue.apply(taken, *params)
        assert torch.equal(w, padded.take(m.up.weight.full_tensor().detach(), 0))
        assert torch.equal(b, m.up.bias.full_tensor()) and torch.equal(d, m.down.weight.to_local())
        g = torch.randn_like(w)
        (w * g).sum().backward(inputs=params)
        assert isinstance(m.up.weight.grad, DTensor)
        torch.testing.assert_close(m.up.weight.grad.full_tensor(), padded.put([g], 6))


def test_a_gradient_that_is_due_and_does_not_come() -> None:
    with stored(model()) as (m, place):
        taken = Taken(place, ["w", "d"], [None, None], due=frozenset(["d"]))
        w, d = Prologue.apply(taken, m.up.bias, m.down.bias)
        with pytest.raises(UnsupportedError, match="^d: has a gradient on one device"):
            w.sum().backward()
        assert d.shape == (3,)


def test_gradients_that_are_to_be_finite() -> None:
    from tspc.base.errors import NonFiniteError

    with stored(model()) as (m, place):
        (b,) = Prologue.apply(Taken(place, ["b"], [None], check=True), m.up.bias)
        with pytest.raises(NonFiniteError, match="the gradient of b is not finite"):
            (b * float("nan")).sum().backward()
