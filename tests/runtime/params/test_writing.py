"""What would write a shard as if it were the whole: refused, or given the whole on the first
rank."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from tests.support.group import stored
from tspc.base.errors import ShardedParameterError
from tspc.runtime.params.whole import active
from tspc.runtime.params.writing import gathered, guard, inner, loaded, settled, writing, written


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4).double()


def test_a_shard_is_not_pickled_what_is_whole_is() -> None:
    with stored(model()) as (m, _):
        guard()
        with pytest.raises(ShardedParameterError, match=r"a shard \[4, 3\] .* part \[4, 3\]"):
            pickle.dumps(m.weight)
        bias = pickle.loads(pickle.dumps(m.bias))
        assert isinstance(bias, nn.Parameter) and not isinstance(bias, DTensor)
        assert torch.equal(bias, m.bias.full_tensor())
        plain = pickle.loads(pickle.dumps(m.bias.detach()))
        assert type(plain) is torch.Tensor and not plain.requires_grad


def test_loaded_states_are_cut_like_their_parameter() -> None:
    with stored(model()) as (m, _):
        x = torch.ones(4, 3, dtype=torch.float64)
        got = loaded(m.weight, x)
        assert isinstance(got, DTensor) and got.placements == m.weight.placements
        other = loaded(m.weight, torch.ones(5))
        assert isinstance(other, DTensor) and other.placements[0].is_replicate()
        for value in (torch.tensor(1.0), got):
            assert loaded(m.weight, value) is value
        assert loaded(nn.Parameter(x), x) is x


def test_states_are_whole_while_a_library_writes() -> None:
    plain, x = model(), torch.randn(2, 3, dtype=torch.float64)
    with stored(model()) as (m, _):
        optimizers = [torch.optim.Adam(n.parameters()) for n in (m, plain)]
        for n, o in zip((m, plain), optimizers):
            n(x).sum().backward()
            o.step()
        with writing("a writer", [m], [optimizers[0]]) as writes:
            assert writes and active() is not None
            state, of_optimizer = m.state_dict(), optimizers[0].state_dict()
            with writing("inside of another", [m]) as again:
                assert again
            assert type(written(m.weight)) is torch.Tensor
        assert active() is None and isinstance(written(m.weight), DTensor)
        for k, v in plain.state_dict().items():
            assert type(state[k]) is torch.Tensor
            torch.testing.assert_close(state[k], v)
        wanted = optimizers[1].state_dict()["state"][0]["exp_avg"]
        torch.testing.assert_close(of_optimizer["state"][0]["exp_avg"], wanted)
        assert isinstance(optimizers[0].state_dict()["state"][0]["exp_avg"], DTensor)


def test_without_shards_nothing_is_gathered() -> None:
    with writing("a writer", [model()]) as writes:
        assert writes and active() is None


def test_an_error_of_the_writer_passes() -> None:
    with stored(model()) as (m, _):
        with pytest.raises(ValueError, match="disk"), writing("a writer", [m]):
            raise ValueError("disk")
        whole, among = gathered("a state", {"w": m.weight, "n": [3, m.bias]})
        assert type(whole["w"]) is torch.Tensor and whole["n"][0] == 3
        with settled("a state", among):
            assert among.first
        with pytest.raises(ValueError, match="disk"), settled("a state", among):
            raise ValueError("disk")


def test_the_optimizer_in_a_wrapper() -> None:
    class Wrapper(torch.optim.SGD):
        def __init__(self, held: torch.optim.Optimizer) -> None:
            super().__init__([nn.Parameter(torch.ones(1))])
            self.optimizer = held

    plain = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    assert inner(Wrapper(Wrapper(plain))) is plain and inner(plain) is plain
