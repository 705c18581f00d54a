"""Collectives as direct sends between ranks of gloo groups, and the comparison of one number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.group import in_threads
from tspc.runtime.comm import direct
from tspc.runtime.comm.direct import Alike, Received, Summed, Transfers
from tspc.runtime.comm.failures import Lost
from tspc.runtime.comm.requests import Axis, Shift

Tensor = torch.Tensor


def of(rank: int, *shape: int) -> Tensor:
    return (
        torch.arange(24.0, dtype=torch.float64)[: int(torch.tensor(shape).prod())].view(shape)
        + 100 * rank
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_collective_gives_what_it_says(ranks: int) -> None:
    def run(rank: int, group: Any) -> tuple[Any, ...]:
        shifted = direct.shift(of(rank, 4), rank, ranks, group)
        gathered = direct.all_gather(of(rank, 2, 3), rank, ranks, group, 5)
        summed = direct.reduce_scatter(of(rank, ranks, 2), rank, ranks, group)
        results = shifted.wait(), gathered.wait(), summed.wait()
        assert shifted.sent is None and summed.near == (rank, ranks) and not summed.blocks
        assert torch.equal(summed.wait(), results[2])
        return results

    for r, (shifted, gathered, summed) in enumerate(in_threads(run, ranks)):
        assert torch.equal(shifted, of((r - 1) % ranks, 4))
        assert torch.equal(gathered, torch.stack([of(s, 2, 3) for s in range(ranks)]))
        assert torch.equal(summed, sum(of(s, ranks, 2)[r] for s in range(ranks)))


def test_what_is_summed_is_not_written_to() -> None:
    def run(rank: int, group: Any) -> Tensor:
        x = of(rank, 2, 2)
        direct.reduce_scatter(x, rank, 2, group).wait()
        return x

    assert all(torch.equal(x, of(r, 2, 2)) for r, x in enumerate(in_threads(run, 2)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_whether_all_have_the_same_number(ranks: int) -> None:
    words = [[7] * ranks, [2**63 - 1] * ranks, [-(2**63)] * ranks, [*[7] * (ranks - 1), 8]]

    def run(rank: int, group: Any) -> list[bool]:
        alike = Alike(Axis("t", ranks, rank), Wrapped(group))  # type: ignore[arg-type]
        return [alike(w[rank]) for w in words]

    for answers in in_threads(run, ranks):
        assert answers == [True, True, True, ranks == 1]


class Wrapped:
    """A group as torch hands it out, around one of gloo's."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def _get_backend(self, device: torch.device) -> Any:
        return self.group


class Failing:
    def __init__(self, error: str = "") -> None:
        self.error = error

    def wait(self) -> None:
        if self.error:
            raise RuntimeError(self.error)


@pytest.mark.parametrize("place,peer", [(0, 0), (1, 2), (2, 3), (3, 3)])
def test_a_transfer_that_fails_tells_with_whom(place: int, peer: int) -> None:
    works = [Failing("gloo: connection closed" if i == place else "") for i in range(4)]
    transfers = Received(works, None)
    transfers.kind, transfers.link, transfers.near = Shift, "weights", (1, 4)
    with pytest.raises(Lost) as caught:
        transfers.wait()
    assert (caught.value.collective, caught.value.peer) == ("Shift of weights", peer)
    alone = Transfers([Failing("nccl timeout")])
    with pytest.raises(Lost) as caught:
        alone.finish()
    assert caught.value.peer is None


def test_another_error_is_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="^shapes differ$"):
        Summed([Failing("shapes differ")], [], 0, None).wait()
