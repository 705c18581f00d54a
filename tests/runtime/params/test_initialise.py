"""A stored model is initialised as one device constructs it: in place, anew, or by a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from tests.support.group import stored
from tspc.base.errors import PlanError
from tspc.runtime.comm.place import Place
from tspc.runtime.comm.requests import Axis
from tspc.runtime.params.initialise import Wholes, _needs, initialise
from tspc.seams.compiler import storage_key


class Model(nn.Module):
    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("steps", torch.zeros(1))


class Resetting(Model):
    def reset_parameters(self) -> None:
        self.steps.fill_(3)


class Own(Model):
    def init_weights(self) -> None:
        for p in self.parameters():
            nn.init.normal_(p)
        self.steps.zero_()


class Configured(Model):
    config = 3

    @classmethod
    def _from_config(cls, config: Any) -> Model:
        return cls(config)


class Tied(Model):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Linear(3, 4)
        self.two.weight = self.one.weight


def values(m: nn.Module) -> list[torch.Tensor]:
    both = [*m.named_parameters(), *m.named_buffers()]
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for _, x in both]


def initialised(kind: type[Model], seed: int = 5, **how: Any) -> list[torch.Tensor]:
    with stored(kind()) as (m, place):
        with torch.no_grad():
            for p in m.parameters():
                p.zero_()
        torch.manual_seed(seed)
        initialise(m, place, **how)
        return [x.clone() for x in values(m)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", [Resetting, Configured])
def test_as_the_constructor_does(kind: Callable[[], Model]) -> None:
    torch.manual_seed(5)
    wanted = kind()
    if kind is Resetting:
        wanted.steps.fill_(3)
    assert same(initialised(kind), values(wanted))  # type: ignore[arg-type]


def test_by_a_constructor_that_is_given() -> None:
    torch.manual_seed(5)
    wanted = values(Model())
    assert same(initialised(Model, build=Model), wanted)
    with pytest.raises(PlanError, match=r"two.weight is \(2, 4\), what was built has \(3, 4\)"):
        initialised(
            Model, build=lambda: nn.ModuleDict({"one": nn.Linear(3, 4), "two": nn.Linear(4, 3)})
        )
    with pytest.raises(PlanError, match="nothing of that name"):
        initialised(Model, build=lambda: nn.ModuleDict({"one": nn.Linear(3, 4)}))


def test_by_init_weights_or_a_function() -> None:
    torch.manual_seed(5)
    wanted = Own()
    torch.manual_seed(5)
    wanted.init_weights()
    assert same(initialised(Own), values(wanted))

    def fill(m: nn.Module) -> None:
        for x in [*m.parameters(), *m.buffers()]:
            x.fill_(2.0)

    assert all((x == 2).all() for x in initialised(Model, init_fn=fill))


def test_what_nothing_initialises_is_told() -> None:
    with pytest.raises(PlanError, match="nothing initialises steps: the model"):
        initialised(Model)
    with pytest.raises(PlanError, match="not both"):
        initialised(Model, build=Model, init_fn=print)
    with pytest.raises(PlanError, match="two and one share a parameter and both initialise it"):
        initialised(Tied)
    with torch.device("meta"):
        on_meta = Model()
    with pytest.raises(PlanError, match="one.weight is on meta"):
        initialise(on_meta, Place(Axis("t", 1, 0)))


def test_one_whole_tensor_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of two: what it keeps of others is its part."""
    wholes = Wholes(Place(Axis("t", 2, 1)))
    a, b = torch.arange(5.0), torch.arange(4.0) * 2
    with wholes:
        wholes.by = "a test"
        wholes.keep(a)
        wholes.keep(b)
        b.mul_(1)
        assert a.untyped_storage().nbytes() == 0 and b.untyped_storage().nbytes() == 16
        kept = wholes.kept[storage_key(a)]
        assert kept.chunk is not None and kept.chunk.tolist() == [3, 4, 0]
        part = torch.zeros(4)
        wholes.store(part, b)
        assert part.tolist() == [0, 2, 4, 6] and b.untyped_storage().nbytes() == 0
    assert wholes.kept[storage_key(b)].written == "a test"


def test_what_needs_arguments() -> None:
    assert _needs(lambda m: m) and not _needs(lambda: 0)
    assert not _needs(lambda m=1, *args, **kwargs: m)
