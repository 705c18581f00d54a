"""Modules whose parameters may be shards: read whole in a call, saved, loaded, moved, copied."""

from __future__ import annotations

import copy
import pickle
from types import CodeType

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from tests.support.group import stored
from tspc.base.errors import ShardedParameterError
from tspc.runtime.params import modules


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


def test_classes_are_one_a_kind() -> None:
    classes = [modules._sharded_class(Mlp, ("tied",)) for _ in range(2)]
    assert classes[0] is classes[1]


def test_modules_read_whole_parameters_before_there_are_shards() -> None:
    m = model()
    assert not modules.prepare([m]) and modules.prepare([m])
    assert m.tied is m.up.weight and torch.equal(m(X), model()(X))
    assert type(copy.deepcopy(m)) is type(m)
    m.register_parameter("late", nn.Parameter(torch.ones(1)))
    assert not modules.prepare([m]) and m.late.shape == (1,)
    assert type(m)._tspc_class is Mlp


def test_what_dynamo_traces_in_the_place_of_a_shard() -> None:
    outside: list[CodeType] = []
    with stored(model()) as (m, _):
        w = m.up.weight
        w.grad = torch.zeros_like(w)
        assert modules.in_trace(w, outside) is None  # no module is called
        assert modules.in_trace(torch.ones(2), [modules._call.__code__]) is None
        for _ in range(2):
            stand = modules.in_trace(w, [modules._call.__code__])
            assert stand is not None
            with stand as p:
                assert type(p) is nn.Parameter and (p.shape, p.dtype) == (w.shape, w.dtype)
                assert p.grad is not None and p.grad.shape == w.shape
                with pytest.raises(torch._dynamo.exc.Unsupported, match="gradient of a sharded"):
                    modules.in_trace(p.grad, [modules._call.__code__])
                assert modules.shard_of(p) is w
                assert p.untyped_storage().nbytes() == w.numel() * w.element_size()
            assert p.untyped_storage().nbytes() == p.grad.untyped_storage().nbytes() == 0
        assert modules._WHOLE[w] is p
        w.requires_grad_(False)
        w.grad = None
        stand = modules.in_trace(w, [modules._call.__code__])
        assert stand is not None
        with stand as p:
            assert not p.requires_grad and p.grad is None
        assert modules.shard_of(w) is w and modules.shard_of(3) == 3


def test_a_call_reads_them_whole_and_gradients_are_cut() -> None:
    plain = model()
    with stored(model()) as (m, _):
        y = m(X)
        assert torch.equal(y.detach(), plain(X).detach()) and type(y) is torch.Tensor
        y.sum().backward()
        plain(X).sum().backward()
        for p, q in zip(m.parameters(), plain.parameters()):
            assert isinstance(p.grad, DTensor) and p.grad.placements == p.placements
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)


def test_whole_states_are_cut_when_they_are_loaded() -> None:
    other = {k: torch.randn_like(v) for k, v in model().state_dict().items()}
    with stored(model()) as (m, _):
        m.load_state_dict(other)
        assert all(isinstance(x, DTensor) for n, x in m.state_dict().items() if n != "scale")
        torch.testing.assert_close(m.down.weight.full_tensor(), other["down.weight"])


def test_moved_models_keep_their_parameters() -> None:
    with stored(model()) as (m, _):
        before = list(m.parameters())
        m(X).sum().backward()
        m.float()
        assert all(a is b for a, b in zip(before, m.parameters()))
        assert {p.dtype for p in m.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in m.parameters() if p.grad is not None} == {torch.float32}
        assert m(X.float()).dtype == torch.float32


def test_copies_of_a_model() -> None:
    with stored(model()) as (m, _):
        other = copy.deepcopy(m)
        assert other.up.weight is not m.up.weight and other.tied is other.up.weight
        with torch.no_grad():
            other.up.weight.zero_()
        assert m.up.weight.full_tensor().abs().sum() > 0
        assert torch.equal(m(X), m(X)) and isinstance(other, Mlp)
        other(X).sum().backward()
        assert isinstance(other.down.weight.grad, DTensor)
        with pytest.raises(ShardedParameterError, match="was to be pickled"):
            pickle.dumps(m.up.weight)
