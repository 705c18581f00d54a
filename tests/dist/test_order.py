"""What each rank issues to its process groups under Inductor: the program's own order, alike on
all ranks, also from warm caches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.distributed import ProcessGroup

from tests.support.models import VOCABULARY, tokens_of
from tests.support.world import World
from tspc.runtime.execute import PLACES
from tspc.runtime.lowering.inductor import KeepOrder

pytestmark = pytest.mark.dist

# the methods of a process group that the collectives call; torch 2.13 renamed three
ISSUING = (
    *("send", "broadcast", "reduce", "allreduce", "_allgather_base", "_reduce_scatter_base"),
    *("alltoall_base", "all_gather_single", "reduce_scatter_single", "all_to_all_single"),
)
Issued = tuple[str, str, tuple[int, ...], str]


@contextlib.contextmanager
def issued() -> Iterator[list[Issued]]:
    """(kind, link, shape, dtype) of all that this rank issues on the groups of its axis."""
    found: list[Issued] = []

    def watch(kind: str) -> Any:
        real = getattr(ProcessGroup, kind)

        def issue(self: ProcessGroup, *args: Any) -> Any:
            x = args[0][0] if isinstance(args[0], list) else args[0]
            found.append((kind, _link(self), tuple(x.shape), str(x.dtype)))
            return real(self, *args)

        return mock.patch.object(ProcessGroup, kind, issue)

    with contextlib.ExitStack() as stack:
        for kind in ISSUING:
            if hasattr(ProcessGroup, kind):
                stack.enter_context(watch(kind))
        yield found


def _link(group: ProcessGroup) -> str:
    links = {g.group_name: l for p in PLACES.values() for l, g in p.groups.items()}
    return links.get(group.group_name, "other")


class Branches(nn.Module):
    """Three branches, each independent of the others and of another width; Inductor alone would
    reorder them."""

    def __init__(self, widths: tuple[int, ...] = (64, 8, 32)):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(VOCABULARY, w) for w in widths)
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in widths)
        self.heads = nn.ModuleList(nn.Linear(w, VOCABULARY) for w in widths)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        xs = [table(tokens) for table in self.tables]
        ys = [norm(x) for norm, x in zip(self.norms, xs)]
        losses = [
            F.cross_entropy(head(y).flatten(0, 1), labels.flatten())
            for head, y in zip(self.heads, ys)
        ]
        return losses[0] + losses[1] * losses[2]


def order(options: dict, length: int) -> tuple[list[Issued], list[Issued], dict[str, int]]:
    """What the second step issues, forward and backward, and Inductor's counters."""
    torch.manual_seed(0)
    counters.clear()
    fn = torch.compile(Branches(), backend="tsp", options=options)
    tokens, labels = tokens_of(length), tokens_of(length, seed=1)
    fn(tokens, labels).backward()
    with issued() as forward:
        loss = fn(tokens, labels)
    with issued() as backward:
        loss.backward()
    kept = ([s for s in part if s[1] != "checks"] for part in (forward, backward))
    return *kept, dict(counters["inductor"])


def free(options: dict, length: int) -> tuple[list[Issued], list[Issued], dict[str, int]]:
    """`order` without tspc's ordering pass."""
    with (
        mock.patch.object(KeepOrder, "__call__", lambda self, graph: None),
        mock.patch.object(KeepOrder, "uuid", lambda self: "none"),
    ):
        return order(options, length)


@pytest.mark.parametrize("schedule", ["ring", pytest.param("stationary", marks=pytest.mark.wide)])
def test_the_order_is_the_programs(world: Any, schedule: str) -> None:
    options = {"schedule": schedule}
    eager = {**options, "compiler": "eager"}
    expected = world(2).run(order, options=eager, length=40)[0][:2]
    assert len(expected[0]) >= 9 and len(expected[1]) >= 13
    for forward, backward, _ in world(2).run(order, options=options, length=40):
        assert (forward, backward) == expected


@pytest.mark.wide
def test_inductor_alone_reorders(world: Any) -> None:
    """Else the test above would show nothing."""
    options = {"schedule": "ring"}
    kept, others = (world(2).run(f, options=options, length=40) for f in (order, free))
    assert all(a[0] != b[0] and sorted(a[0]) == sorted(b[0]) for a, b in zip(kept, others))


@pytest.mark.wide
def test_the_order_from_warm_caches(world: Any) -> None:
    options = {"schedule": "ring"}
    first = world(2).run(order, options=options, length=40)[0][:2]
    again = World(2)
    for forward, backward, counts in again.run(order, options=options, length=40):
        assert counts["fxgraph_cache_hit"] >= 6 and not counts.get("fxgraph_cache_miss")
        assert (forward, backward) == first
    again.close()
