"""Communications that a runtime generator yields. Each answer is a handle: `handle = yield
Shift(x)`; `y = handle.wait()`.

`link` names the process group: "weights" or "activations". Generators end with `return result`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch


class Handle(Protocol):
    """A communication in flight."""

    def wait(self) -> Any: ...


@dataclass(frozen=True)
class Request:
    """One communication that a generator yields.

    tensor: what this rank sends (for Broadcast on other ranks than the source: a buffer of the
    shape).
    """

    tensor: torch.Tensor
    link: str = "activations"


@dataclass(frozen=True)
class Shift(Request):
    """Send to the next rank (r+1), receive from the previous one.

    Result: a new tensor of the same shape.
    """


@dataclass(frozen=True)
class Broadcast(Request):
    """Send from `source` to all; the result is its tensor (on the source the very one sent)."""

    source: int = 0


@dataclass(frozen=True)
class Reduce(Request):
    """Add up on one rank; the result is the sum over ranks on `target`, None elsewhere.

    The driver may write to `tensor`.
    """

    target: int = 0


@dataclass(frozen=True)
class AllReduce(Request):
    """Add up on all ranks; the result is the sum over ranks."""


@dataclass(frozen=True)
class AllGather(Request):
    """Collect the tensors of all ranks; the result is [D, *shape]."""


@dataclass(frozen=True)
class ReduceScatter(Request):
    """Add up blocks: of [D, *shape] rank r gets the sum over ranks of block r, [*shape]."""


@dataclass(frozen=True)
class AllToAll(Request):
    """Transpose blocks over ranks: of [D, *shape], block i of the result is rank i's block r."""


@dataclass(frozen=True)
class Exchange(Request):
    """Send rows unevenly: the first sent[0] rows of [n, *shape] go to rank 0, and so on; the result
    is received[i] rows from each rank i, in order."""

    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()


@dataclass(frozen=True)
class Axis:
    """This rank's place on the TSP axis.

    `name` is stable over ranks and runs (it is part of compiled graphs).
    """

    name: str
    size: int
    rank: int


Result = TypeVar("Result")
Steps = Generator[Request, Handle, Result]
