"""Communications that a runtime generator yields. Each answer is a handle: `handle = yield
Shift(x)`; `y = handle.wait()`.

`link` names the process group: "weights" or "activations". Generators end with `return result`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Handle(Protocol):
    """A communication in flight."""

    def wait(self) -> Any: ...


@dataclass(frozen=True)
class Request:
    """Tensor: what this rank sends (for Broadcast on other ranks than the source: a buffer of the
    shape)."""

    tensor: torch.Tensor
    link: str = "activations"


@dataclass(frozen=True)
class Shift(Request):
    """Send to the next rank (r+1), receive from the previous one.

    Result: a new tensor of the same shape.
    """


@dataclass(frozen=True)
class Broadcast(Request):
    """Result: the source's tensor (on the source the very one that was sent)."""

    source: int = 0


@dataclass(frozen=True)
class Reduce(Request):
    """Result: the sum over ranks on `target`, None elsewhere.

    The driver may write to `tensor`.
    """

    target: int = 0


@dataclass(frozen=True)
class AllReduce(Request):
    """Result: the sum over ranks."""


@dataclass(frozen=True)
class AllGather(Request):
    """Result: [D, *shape]."""


@dataclass(frozen=True)
class ReduceScatter(Request):
    """Tensor is [D, *shape]; result: the sum over ranks of block r, [*shape]."""


@dataclass(frozen=True)
class AllToAll(Request):
    """Tensor is [D, *shape]; result [D, *shape]: block i comes from rank i's block r."""


@dataclass(frozen=True)
class Axis:
    """This rank's place on the TSP axis.

    `name` is stable over ranks and runs (it is part of compiled graphs).
    """

    name: str
    size: int
    rank: int


Steps = Generator[Request, Handle, Any]
