"""Collectives on a CPU as direct sends between ranks.

Gloo makes a reduce-scatter of a whole all-reduce, a reduce of one and a gather, and copies an
all-gather more than once; sent directly, each element leaves a rank as often as the closed forms
say and arrives where it stays. Sums are in rank order, as in lockstep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

Tensor = torch.Tensor


def send(x: Tensor, to: int, group: Any) -> Any:
    return dist.isend(x, group=group, group_dst=to)


def receive(into: Tensor, source: int, group: Any) -> Any:
    return dist.irecv(into, group=group, group_src=source)


@dataclass
class Received:
    """Transfers under way and what is there when they are done; keeps what is sent alive."""

    works: list[Any]
    result: Any
    sent: Any = None

    def wait(self) -> Any:
        for work in self.works:
            work.wait()
        self.works, self.sent = [], None
        return self.result


@dataclass
class Summed:
    """One block of every rank under way, summed in rank order when they are there."""

    works: list[Any]
    blocks: list[Tensor]
    rank: int
    sent: Any

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        total = self.blocks[0].clone() if self.rank == 0 else self.blocks[0]
        for block in self.blocks[1:]:
            total += block
        self.works, self.blocks, self.sent = [], [total], None
        return total


@dataclass
class Chained:
    """The tensors of the other ranks come one after the other, two buffers in all."""

    own: Tensor
    rank: int
    ranks: int
    group: Any
    total: Tensor | None = None

    def __post_init__(self) -> None:
        self.others = [r for r in range(self.ranks) if r != self.rank]
        self.flying = [self._next() for _ in self.others[:2]]

    def _next(self, into: Tensor | None = None) -> tuple[Any, Tensor]:
        into = torch.empty_like(self.own) if into is None else into
        return receive(into, self.others.pop(0), self.group), into

    def wait(self) -> Tensor:
        if self.total is None:
            self.total = self.own.clone()
        while self.flying:
            work, got = self.flying.pop(0)
            work.wait()
            self.total += got
            if self.others:
                self.flying.append(self._next(got))
        return self.total


def shift(x: Tensor, rank: int, ranks: int, group: Any) -> Received:
    out = torch.empty_like(x)
    works = [receive(out, (rank - 1) % ranks, group), send(x, (rank + 1) % ranks, group)]
    return Received(works, out, x)


def all_gather(x: Tensor, rank: int, ranks: int, group: Any) -> Received:
    out = x.new_empty((ranks, *x.shape))
    works = _everyone([x] * ranks, list(out), rank, group)
    out[rank] = x
    return Received(works, out, x)


def reduce_scatter(x: Tensor, rank: int, ranks: int, group: Any) -> Summed:
    blocks = [x[r] if r == rank else x.new_empty(x.shape[1:]) for r in range(ranks)]
    return Summed(_everyone(x, blocks, rank, group), blocks, rank, x)


def reduce(x: Tensor, target: int, rank: int, ranks: int, group: Any) -> Received | Chained:
    if rank == target:
        return Chained(x, rank, ranks, group)
    return Received([send(x, target, group)], None, x)


def _everyone(
    sent: Sequence[Tensor] | Tensor, received: Sequence[Tensor], rank: int, group: Any
) -> list[Any]:
    """Block i goes to rank i, block i comes from rank i; nearest neighbours first."""
    ranks, works = len(received), []
    for k in range(1, ranks):
        source, to = (rank - k) % ranks, (rank + k) % ranks
        works.append(receive(received[source], source, group))
        works.append(send(sent[to], to, group))
    return works
