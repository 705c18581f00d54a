"""What accelerate and what is built on it call a process: a replica, all ranks of one TSP axis.

The replicas of this run, and how those libraries are led to count them: their functions, their
enumerations, and torch.distributed as they see it.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tspc.base.state import PROCESS, remembered

NAME = "TSP"


@dataclass(frozen=True)
class Replicas:
    """How many, and this rank's.

    peers: the group of the ranks with this one's place on their axes, None where there is one
    replica. firsts: the first rank of each replica.
    """

    count: int = 1
    index: int = 0
    peers: dist.ProcessGroup | None = None
    firsts: tuple[int, ...] = (0,)


_REPLICAS = remembered(PROCESS, [Replicas()])


def replicas() -> Replicas:
    """Those of the run."""
    return _REPLICAS[0]


def use(now: Replicas) -> None:
    """From now on these are those of the run."""
    _REPLICAS[:] = [now]


def shared() -> bool:
    """Whether ranks share the model."""
    from accelerate.state import PartialState

    kind: enum.Enum | None = PartialState._shared_state.get("distributed_type")
    return kind is not None and kind.value == NAME


def first() -> bool:
    """Whether this rank is the first of its replica."""
    return dist.get_rank() in replicas().firsts


class _Part(types.ModuleType):
    """A module, but for some names."""

    def __init__(self, of: types.ModuleType, **names: object):
        super().__init__(of.__name__)
        self.__dict__.update(names, _of=of)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_of"], name)


def among_replicas() -> types.ModuleType:
    """torch with a torch.distributed whose processes are replicas: what is gathered comes from one
    rank of each, what one sends goes from its first rank to all."""

    def gathering(do: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if not shared():
                return do(*args, **kwargs)
            here = replicas()
            return do(*args, **kwargs, group=here.peers) if here.count > 1 else None

        return call

    def sending(do: Callable[..., object]) -> Callable[..., object]:
        def call(x: object, src: int = 0) -> object:
            return do(x, src=replicas().firsts[src] if shared() else src)

        return call

    gathers = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce")
    names = {n: gathering(getattr(dist, n)) for n in gathers}
    names |= {n: sending(getattr(dist, n)) for n in ("broadcast", "broadcast_object_list")}
    return _Part(torch, distributed=_Part(dist, **names))


def wrap_property(owner: type, name: str, do: Callable[..., object]) -> None:
    """owner.name becomes do(what it was, the object)."""
    before = getattr(owner, name).fget
    setattr(owner, name, property(functools.wraps(before)(functools.partial(do, before))))


def wrap(owner: type | types.ModuleType, name: str, do: Callable[..., object]) -> None:
    """owner.name(...) becomes do(what it was, ...)."""
    before = getattr(owner, name)

    @functools.wraps(before)
    def call(*args: object, **kwargs: object) -> object:
        return do(before, *args, **kwargs)

    setattr(owner, name, call)


def member(kind: type[enum.Enum]) -> enum.Enum:
    """A new member of an enumeration of names: the libraries look backends up in theirs only."""
    if NAME not in kind.__members__:
        new = str.__new__(kind, NAME) if issubclass(kind, str) else object.__new__(kind)
        new._name_ = new._value_ = NAME
        kind._member_names_.append(NAME)
        kind._member_map_[NAME] = new
        kind._value2member_map_[NAME] = new
        type.__setattr__(kind, NAME, new)
    return kind[NAME]
