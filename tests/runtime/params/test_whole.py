"""Whole states out of shards and into them, on one rank; what does not load is told."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from tests.support.group import stored
from tspc.base.errors import PlanError
from tspc.runtime.params import whole
from tspc.runtime.params.whole import (
    Gathered,
    Sent,
    fill,
    full_state_dict,
    identity,
    load_full_state_dict,
    root_of,
    sharers,
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4)
        self.two.weight = self.one.weight
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) * self.two(x)


def model(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied().double()


X = torch.randn(2, 3, dtype=torch.float64)


def stepped(m: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(m.parameters(), 0.1)
    m(X).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def test_whole_states_are_the_plain_ones() -> None:
    plain = model()
    of_plain = stepped(plain)
    with stored(model()) as (m, _):
        optimizer = stepped(m)
        state, of_optimizer = full_state_dict(torch.compile(m), optimizer)
        assert list(state) == list(plain.state_dict()) and state._metadata
        assert state["one.weight"] is state["two.weight"]
        for k, v in plain.state_dict().items():
            assert type(state[k]) is torch.Tensor
            torch.testing.assert_close(state[k], v)
        torch.testing.assert_close(of_optimizer, of_plain.state_dict())
        assert torch.equal(full_state_dict(m)["one.bias"], state["one.bias"])


def test_a_whole_state_is_loaded_into_shards() -> None:
    plain = model(1)
    of_plain = stepped(plain)
    saved = copy.deepcopy(of_plain.state_dict())
    state = {f"_orig_mod.{k}": v for k, v in plain.state_dict().items()}
    with stored(model()) as (m, _):
        optimizer = torch.optim.Adam(m.parameters(), 0.1)
        loaded = load_full_state_dict(m, state, optimizer, saved)
        assert loaded.missing_keys == [] and m.one.weight is m.two.weight
        assert isinstance(m.one.weight, DTensor)
        assert isinstance(optimizer.state[m.one.weight]["exp_avg"], DTensor)
        for n, o in ((plain, of_plain), (m, optimizer)):
            n(X).square().sum().backward()
            o.step()
        for p, q in zip(m.parameters(), plain.parameters()):
            torch.testing.assert_close(p.full_tensor(), q)


def test_what_does_not_load_is_told() -> None:
    with stored(model()) as (m, _):
        optimizer = torch.optim.Adam(m.parameters())
        with pytest.raises(PlanError, match="optimizer= and optimizer_state= go together"):
            load_full_state_dict(m, model().state_dict(), optimizer)
        with pytest.raises(PlanError, match="the first rank has no state, but NoneType"):
            load_full_state_dict(m, None)
        with pytest.raises(RuntimeError, match="Missing key"):
            load_full_state_dict(m, {"steps": torch.tensor(1)})
        with pytest.raises(PlanError, match="int is no optimizer"):
            full_state_dict(m, 3)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="takes a module, compiled or not"):
        root_of(3, "here")


def test_one_process_without_shards_has_the_same_calls() -> None:
    plain = model()
    state = full_state_dict(plain)
    assert torch.equal(state["one.weight"], plain.one.weight)
    assert state["one.weight"].data_ptr() != plain.one.weight.data_ptr()
    other = model(1)
    load_full_state_dict(other, state)
    assert torch.equal(other.one.weight, plain.one.weight)


def test_tensors_that_are_one() -> None:
    x = torch.ones(4, 3)
    assert identity(x) == identity(x.view(4, 3)) != identity(x[1:]) and identity(x) != identity(x.T)
    with stored(model()) as (m, _):
        assert identity(m.one.weight) == identity(m.two.weight.detach())
        take = Gathered(sharers(*m.parameters()))
        first = take(m.one.weight)
        assert take(m.two.weight) is first and take(5) == 5
        assert take.known(m.one.weight.detach()) is first and take.known(x) is None
        assert whole.active() is None
        with whole.shown(take):
            assert whole.active() is take


def test_where_a_whole_tensor_is_put() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    with stored(model()) as (m, _):
        target = m.state_dict()["one.weight"]
        assert fill(target, x) is target and torch.equal(m.one.weight.full_tensor(), x)
        assert fill(target, x[:2]) is not target and fill(None, x) is x
        plain = torch.zeros(4, 3, dtype=torch.float64)
        assert fill(plain, x) is plain and torch.equal(plain, x)
        cut = whole.cut(x, m.one.weight)
        assert cut.placements == m.one.weight.placements and torch.equal(cut.full_tensor(), x)


def test_what_the_first_rank_announces_and_sends() -> None:
    with stored(model()) as (m, _):
        among = sharers(*m.parameters())
        assert among.first
        among.meet("a test")
        sent = Sent(among)
        announced = sent.structure({"w": m.one.weight, "n": 3})
        assert announced is not None and announced["n"] == 3
        shape = announced["w"].shape
        assert shape == (4, 3)
        got = sent.take(announced["w"], m.one.weight, torch.device("cpu"))
        assert torch.equal(got, m.one.weight.full_tensor())
        assert among.given("told") == "told"
