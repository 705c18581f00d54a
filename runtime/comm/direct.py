"""Collectives on a CPU as direct sends between ranks.

Gloo makes a reduce-scatter of a whole all-reduce and copies an all-gather more than once; sent
directly, each element leaves a rank as often as the closed forms say and arrives where it stays.
Every rank issues as many sends of the same shapes. Sums are in rank order, as in lockstep.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from tspc.runtime.comm.failures import lost
from tspc.runtime.comm.requests import Axis

Tensor = torch.Tensor
PAIR = struct.Struct("2q")  # faster than tensors of so few
Kind = TypeVar("Kind", bound="Transfers")


class Work(Protocol):
    """What torch has under way."""

    def wait(self) -> object: ...


def send(x: Tensor, to: int, group: dist.ProcessGroup, tag: int = 0) -> Work:
    return group.send([x], to, tag)  # dist.isend's checks take longer than the send


def receive(into: Tensor, source: int, group: dist.ProcessGroup, tag: int = 0) -> Work:
    return group.recv([into], source, tag)


@dataclass
class Transfers:
    """Transfers under way. The driver says which request they answer.

    near: (rank, ranks) of sends between ranks, nearest neighbours first.
    """

    works: Sequence[Work]
    kind: type = field(default=object, init=False)
    link: str = field(default="", init=False)
    near: tuple[int, int] | None = field(default=None, init=False)

    def finish(self) -> None:
        """Raises `failures.Lost` if one of them does not happen."""
        for i, work in enumerate(self.works):
            try:
                work.wait()
            except RuntimeError as e:
                raise lost(e, self.kind, self.link, self._peer(i)) from e
        self.works = []

    def _peer(self, i: int) -> int | None:
        if self.near is None:
            return None
        (rank, ranks), k = self.near, i // 2 + 1
        return (rank + k if i % 2 else rank - k) % ranks


@dataclass
class Received(Transfers):
    """What is there when they are done; keeps what is sent alive."""

    result: Tensor | None
    sent: Tensor | None = None

    def wait(self) -> Tensor | None:
        self.finish()
        self.sent = None
        return self.result


@dataclass
class Summed(Transfers):
    """One block of every rank under way, summed in rank order when they are there."""

    blocks: list[Tensor]
    rank: int
    sent: Tensor | None
    result: Tensor | None = None

    def wait(self) -> Tensor:
        self.finish()
        if self.result is None:
            self.result = self.blocks[0].clone() if self.rank == 0 else self.blocks[0]
            for block in self.blocks[1:]:
                self.result += block
        self.blocks, self.sent = [], None
        return self.result


def shift(x: Tensor, rank: int, ranks: int, group: dist.ProcessGroup) -> Received:
    out = torch.empty_like(x)
    works = [receive(out, (rank - 1) % ranks, group), send(x, (rank + 1) % ranks, group)]
    return _near(Received(works, out, x), rank, ranks)


def all_gather(
    x: Tensor, rank: int, ranks: int, group: dist.ProcessGroup, tag: int = 0
) -> Received:
    out = x.new_empty((ranks, *x.shape))
    works = _everyone([x] * ranks, list(out), rank, group, tag)
    out[rank] = x
    return _near(Received(works, out, x), rank, ranks)


def reduce_scatter(x: Tensor, rank: int, ranks: int, group: dist.ProcessGroup) -> Summed:
    blocks = [x[r] if r == rank else x.new_empty(x.shape[1:]) for r in range(ranks)]
    return _near(Summed(_everyone(x, blocks, rank, group), blocks, rank, x), rank, ranks)


@dataclass
class Alike:
    """Whether all ranks have the same 64-bit number. Collective: an all-reduce of the largest and
    the smallest, in log2(ranks) rounds of one message.

    Gloo's own would keep the caller's code, and the graphs that it names, in torch's record of the
    last 2000 collectives. The messages are kept from call to call.
    """

    axis: Axis
    group: dist.ProcessGroup

    def __post_init__(self) -> None:
        self._sent, self._received = bytearray(PAIR.size), bytearray(PAIR.size)
        self._here = torch.frombuffer(self._sent, dtype=torch.int64)
        self._there = torch.frombuffer(self._received, dtype=torch.int64)
        rank, ranks = self.axis.rank, self.axis.size
        rounds = [1 << k for k in range((ranks - 1).bit_length())]
        # past torch's dispatcher, which takes as long as the message
        self._backend: Any = self.group._get_backend(torch.device("cpu"))
        self._rounds = [((rank - far) % ranks, (rank + far) % ranks, far) for far in rounds]

    def __call__(self, word: int) -> bool:
        most, least = word, ~word
        for source, to, tag in self._rounds:
            PAIR.pack_into(self._sent, 0, most, least)
            coming = self._backend.recv([self._there], source, tag)
            going = self._backend.send([self._here], to, tag)
            coming.wait()
            going.wait()
            others = PAIR.unpack_from(self._received)
            most, least = max(most, others[0]), max(least, others[1])
        return most == ~least


def _near(transfers: Kind, rank: int, ranks: int) -> Kind:
    transfers.near = rank, ranks
    return transfers


def _everyone(
    sent: Sequence[Tensor] | Tensor,
    received: Sequence[Tensor],
    rank: int,
    group: dist.ProcessGroup,
    tag: int = 0,
) -> list[Work]:
    """Block i goes to rank i, block i comes from rank i; nearest neighbours first."""
    ranks, works = len(received), []
    for k in range(1, ranks):
        source, to = (rank - k) % ranks, (rank + k) % ranks
        works.append(receive(received[source], source, group, tag))
        works.append(send(sent[to], to, group, tag))
    return works
