"""Collectives on a CPU as direct sends between ranks.

Gloo makes a reduce-scatter of a whole all-reduce and copies an all-gather more than once; sent
directly, each element leaves a rank as often as the closed forms say and arrives where it stays.
Every rank issues as many sends of the same shapes. Sums are in rank order, as in lockstep.
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
    result: Tensor | None = None

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        if self.result is None:
            self.result = self.blocks[0].clone() if self.rank == 0 else self.blocks[0]
            for block in self.blocks[1:]:
                self.result += block
        self.works, self.blocks, self.sent = [], [], None
        return self.result


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
