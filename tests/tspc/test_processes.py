"""What libraries call a process is a replica: how they are led to count them."""

from __future__ import annotations

import enum
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.group import alone
from tspc import processes
from tspc.processes import (
    NAME,
    Replicas,
    among_replicas,
    first,
    member,
    replicas,
    shared,
    use,
    wrap,
    wrap_property,
)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = replicas()
    yield
    use(before)


def test_those_of_the_run() -> None:
    assert replicas() == Replicas() == Replicas(1, 0, None, (0,))
    use(Replicas(2, 1, None, (0, 2)))
    assert replicas().count == 2 and replicas().firsts == (0, 2)


def test_whether_ranks_share_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import PartialState

    kind: Any = enum.Enum("K", {"A": NAME, "B": "NO"})
    for value, wanted in ((kind.A, True), (kind.B, False), (None, False)):
        monkeypatch.setattr(PartialState, "_shared_state", {"distributed_type": value})
        assert shared() is wanted
    monkeypatch.setattr(PartialState, "_shared_state", {})
    assert not shared()


def test_the_first_of_a_replica() -> None:
    with alone():
        assert first()
        use(Replicas(2, 0, None, (1, 2)))
        assert not first()


def test_a_module_but_for_some_names() -> None:
    part: Any = processes._Part(torch, distributed="ours")
    assert part.distributed == "ours" and part.tanh is torch.tanh and part.__name__ == "torch"
    with pytest.raises(AttributeError):
        part.nothing  # noqa: B018


class Recorder:
    """In the place of torch.distributed's functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[object, ...], dict[str, object]]] = []
        names = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce")
        for n in (*names, "broadcast", "broadcast_object_list"):
            monkeypatch.setattr(dist, n, self.named(n))

    def named(self, name: str) -> Any:
        return lambda *a, **k: self.calls.append((name, a, k))


def test_what_is_gathered_and_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, together = Recorder(monkeypatch), True
    monkeypatch.setattr(processes, "shared", lambda: together)
    ours: Any = among_replicas()
    assert ours.tanh is torch.tanh and ours.distributed.get_rank is dist.get_rank
    ours.distributed.all_reduce("x")
    assert not seen.calls  # one replica gathers nothing
    peers: Any = object()
    use(Replicas(2, 0, peers, (0, 2)))
    ours.distributed.all_gather("xs", "x")
    ours.distributed.broadcast("x", src=1)
    ours.distributed.broadcast_object_list("xs")
    assert seen.calls == [
        ("all_gather", ("xs", "x"), {"group": peers}),
        ("broadcast", ("x",), {"src": 2}),
        ("broadcast_object_list", ("xs",), {"src": 0}),
    ]
    together = False
    ours.distributed.all_reduce("x", op="max")
    ours.distributed.broadcast("x", 1)
    assert seen.calls[3:] == [
        ("all_reduce", ("x",), {"op": "max"}),
        ("broadcast", ("x",), {"src": 1}),
    ]


def test_functions_and_properties_are_wrapped() -> None:
    class Owner:
        @property
        def size(self) -> int:
            """Doc."""
            return 2

        def grow(self, by: int) -> int:
            return self.size + by

    wrap_property(Owner, "size", lambda do, self: 10 * do(self))  # type: ignore[operator]
    wrap(Owner, "grow", lambda do, self, by: -do(self, by))
    assert Owner().size == 20 and Owner().grow(1) == -21 and Owner.grow.__name__ == "grow"
    module = types.ModuleType("m")
    module.f = lambda x: x + 1  # type: ignore[attr-defined]
    wrap(module, "f", lambda do, x: do(x) * 2)
    assert module.f(1) == 4


def test_a_new_member_of_an_enumeration() -> None:
    class Kind(str, enum.Enum):
        A = "a"

    class Plain(enum.Enum):
        A = 1

    for kind in (Kind, Plain):
        new = member(kind)
        assert member(kind) is new is kind[NAME] and kind(NAME) is new  # type: ignore[index]
        assert new.value == new.name == NAME and list(kind)[-1] is new
    assert isinstance(member(Kind), str)
