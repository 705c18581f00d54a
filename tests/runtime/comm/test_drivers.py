"""The drivers: what each request is answered, in lockstep and over process groups; what ranks that
differ are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.group import in_threads
from tspc.base.errors import RankMismatchError
from tspc.runtime.comm import drivers
from tspc.runtime.comm.drivers import Sent, distributed, lockstep, record
from tspc.runtime.comm.requests import (
    AllGather,
    AllReduce,
    AllToAll,
    Axis,
    Broadcast,
    Exchange,
    Reduce,
    ReduceScatter,
    Request,
    Shift,
    Steps,
)

Tensor = torch.Tensor
RANKS = 3


def of(rank: int) -> Tensor:
    return torch.arange(6.0, dtype=torch.float64).view(3, 2) + 10 * rank


def uneven(rank: int) -> Exchange:
    """Rank r sends one row to rank 0 and r + 1 rows to rank 2."""
    sent, received = (1, 0, rank + 1), {0: (1, 1, 1), 1: (0, 0, 0), 2: (1, 2, 3)}[rank]
    return Exchange(torch.cat([of(rank), of(rank)])[: rank + 2], "activations", sent, received)


# request of a rank -> what it is answered
REQUESTS: dict[str, tuple[Callable[[int], Request], Callable[[int], Any]]] = {
    "shift": (lambda r: Shift(of(r)), lambda r: of((r - 1) % RANKS)),
    "broadcast": (lambda r: Broadcast(of(r).clone(), source=1), lambda r: of(1)),
    "reduce": (
        lambda r: Reduce(of(r).clone(), target=2),
        lambda r: of(0) + of(1) + of(2) if r == 2 else None,
    ),
    "all reduce": (lambda r: AllReduce(of(r)), lambda r: of(0) + of(1) + of(2)),
    "all gather": (lambda r: AllGather(of(r)), lambda r: torch.stack([of(0), of(1), of(2)])),
    "reduce scatter": (lambda r: ReduceScatter(of(r)), lambda r: (of(0) + of(1) + of(2))[r]),
    "all to all": (
        lambda r: AllToAll(of(r)),
        lambda r: torch.stack([of(s)[r] for s in range(RANKS)]),
    ),
    "exchange": (
        uneven,
        lambda r: torch.cat(
            [
                uneven(s).tensor.split(uneven(s).sent)[r]  # type: ignore[arg-type]
                for s in range(RANKS)
            ]
        ),
    ),
}
SENT = {
    "shift": 6,
    "broadcast": 4,
    "reduce": 4,
    "all reduce": 8,
    "all gather": 12,
    "reduce scatter": 4,
    "all to all": 4,
    "exchange": 4,
}


def steps(rank: int, name: str) -> Steps[Any]:
    handle = yield REQUESTS[name][0](rank)
    return handle.wait()


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_in_lockstep(name: str) -> None:
    with record() as sent:
        got = lockstep([steps(r, name) for r in range(RANKS)])
    for r, x in enumerate(got):
        wanted = REQUESTS[name][1](r)
        assert x is None if wanted is None else torch.equal(x, wanted)
    (one,) = sent
    assert one.kind.lower() == name.replace(" ", "") and one.elements == SENT[name]
    assert (one.link, one.dtype) == ("activations", torch.float64)


def over_groups(names: list[str]) -> list[Any]:
    """On a rank of a world."""
    group, rank = dist.group.WORLD, dist.get_rank()
    axis, groups = Axis("test", dist.get_world_size(), rank), {"activations": group}
    with record() as sent:
        got = [distributed(steps(rank, n), axis, groups, "a test") for n in names]  # type: ignore[arg-type]
    return [got, [s.elements for s in sent]]


@pytest.mark.dist
def test_requests_over_process_groups(world: Any) -> None:
    names = list(REQUESTS)
    for r, (got, sent) in enumerate(world(RANKS).run(over_groups, names=names)):
        for n, x in zip(names, got, strict=True):
            wanted = REQUESTS[n][1](r)
            assert x is None if wanted is None else torch.equal(x, wanted), n
        issued = {**SENT, "exchange": uneven(r).tensor.numel()}
        assert sent == [issued[n] for n in names]


@pytest.mark.parametrize("name", ["shift", "all gather", "reduce scatter"])
def test_requests_that_are_sent_directly(name: str) -> None:
    def run(rank: int, group: Any) -> Any:
        return distributed(steps(rank, name), Axis("t", RANKS, rank), {"activations": group})

    for r, x in enumerate(in_threads(run, RANKS)):
        assert torch.equal(x, REQUESTS[name][1](r))


def test_one_rank_answers_itself() -> None:
    with record() as sent:
        assert torch.equal(distributed(steps(0, "shift"), Axis("t", 1, 0), {}), of(0))
    assert not sent


def test_ranks_that_issue_other_requests() -> None:
    with pytest.raises(RankMismatchError, match="rank 0 issues .*'Shift'.*, rank 1 issues .*All"):
        lockstep([steps(0, "shift"), steps(1, "all reduce")])

    def silent() -> Steps[None]:
        return None
        yield

    with pytest.raises(RankMismatchError, match=r"ranks \[1\] ended while others"):
        lockstep([steps(0, "shift"), silent()])


def test_records_are_nested_and_end() -> None:
    with record() as outer:
        with record() as inner:
            lockstep([steps(r, "shift") for r in range(RANKS)])
        lockstep([steps(r, "shift") for r in range(RANKS)])
    assert (len(outer), len(inner)) == (2, 1) and not drivers._RECORDS
    assert inner[0] == Sent("Shift", "activations", (3, 2), torch.float64, 6)


def test_totals_leave_what_was_given() -> None:
    x = of(0)
    assert torch.equal(drivers._total([x, of(1)]), of(0) + of(1)) and torch.equal(x, of(0))
