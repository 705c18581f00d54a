"""Ranks of one axis must compile the same graph and get the same data: before anything else is
sent, 64-bit hashes go round on a group of their own, so a rank that differs is told, never waited
for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tspc.errors import RankMismatchError
from tspc.runtime import failures
from tspc.runtime.drivers import distributed
from tspc.runtime.execute import Place
from tspc.runtime.requests import AllGather, Axis, Steps

CHECK = "the check that starts a call or a compile"
FIRST, EVERY = 3, 100  # calls of a graph whose contents "auto" compares
FROZEN = "frozen parameters"  # a fact of a graph: their names
LISTED = 4  # inputs that a message names
ADVICE = (
    "all ranks of the TSP axis run the same model on the same, full batch; use one sampler seed "
    "(DistributedSampler with rank = the data-parallel rank)"
)
SAME_GRAPHS = (
    "all replicas run the same model, with the same parameters used and frozen, on batches of "
    "their own"
)


class Checker:
    """Called with the inputs of each call: shapes are compared at every call, contents now and
    then.

    mode: "auto", True (contents at every call, floats too) or False (nothing). facts: what all
    calls of this graph have in common.
    """

    def __init__(
        self, place: Place, mode: str | bool, names: Sequence[str], facts: Mapping[str, str]
    ):
        self.place, self.mode, self.names, self.calls = place, mode, names, 0
        self.facts = facts

    def __call__(self, tensors: Sequence[Any]) -> None:
        if self.mode is False:
            return
        self.calls += 1
        contents = self.mode is True or self.calls <= FIRST or self.calls % EVERY == 0
        given = {n: x for n, x in zip(self.names, tensors) if isinstance(x, torch.Tensor)}
        shapes = {n: text(x.dtype, x.shape) for n, x in given.items()}
        agree(self.place, {**self.facts, **shapes}, "was called with")
        if contents:
            agree(self.place, digests(given, self.mode is True), "was given other values in")


def agree(place: Place, told: Mapping[str, str], verb: str) -> None:
    """Compare what each rank of the TSP axis tells, by name; collective.

    Raises `RankMismatchError` on all ranks, with what differs.
    """
    _agree(place.axis, place.groups["checks"], told, verb, ADVICE)


def replicas_agree(place: Place, told: Mapping[str, str], verb: str) -> None:
    """The same over the replicas, if there are any."""
    if place.replicas is not None:
        _agree(place.replicas, place.groups["replica checks"], told, verb, SAME_GRAPHS)


def _agree(axis: Axis, group: Any, told: Mapping[str, str], verb: str, advice: str) -> None:
    mine = hashlib.blake2b(repr((verb, sorted(told.items()))).encode(), digest_size=8).digest()
    steps = _gather(torch.tensor([int.from_bytes(mine, "little", signed=True)]))
    found = distributed(steps, axis, {"checks": group}, CHECK).view(-1).tolist()
    if all(h == found[0] for h in found):
        return
    said: list[Any] = [None] * axis.size
    with failures.told(CHECK, group):
        dist.all_gather_object(said, (verb, dict(told)), group)
    wrong = [r for r, h in enumerate(found) if h != found[0]]
    lines = "; ".join(f"rank {r} {_differs(said, r)}" for r in (0, wrong[0]))
    raise RankMismatchError(
        f"ranks {wrong} of axis {axis.name!r} differ from rank 0: {lines}. Do this: {advice}"
    )


def _differs(said: Sequence[tuple[str, dict[str, str]]], rank: int) -> str:
    """What this rank tells otherwise than some other rank."""
    verb, mine = said[rank]
    common = [n for n, v in mine.items() if any(o.get(n, v) != v for _, o in said)]
    alone = [n for n in mine if any(n not in o for _, o in said)]
    names = (common or alone)[:LISTED]
    listed = ", ".join(f"{n}: {_shown(n, mine[n], [o for _, o in said])}" for n in names)
    return f"{verb} {listed or 'nothing'}"


def _shown(name: str, value: str, told: Sequence[Mapping[str, str]]) -> str:
    """Of the frozen parameters only those that are not frozen on all ranks."""
    if name != FROZEN:
        return value
    every = [set(o.get(name, "").split(", ")) for o in told]
    mine = [n for n in value.split(", ") if not all(n in e for e in every)]
    more = f" and {len(mine) - LISTED} more" if len(mine) > LISTED else ""
    return ", ".join(mine[:LISTED]) + more if mine else "those of all ranks"


def _gather(x: torch.Tensor) -> Steps:
    handle = yield AllGather(x, "checks")
    return handle.wait()


def text(dtype: torch.dtype, shape: Sequence[Any]) -> str:
    """Dtype and shape: "int64[2, 8]"."""
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"


def digests(tensors: Mapping[str, torch.Tensor], floats: bool) -> dict[str, str]:
    """A 64-bit hash of each integer (and float) tensor's contents."""
    return {n: _digest(t) for n, t in tensors.items() if floats or not t.dtype.is_floating_point}


def _digest(t: torch.Tensor) -> str:
    data = t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()
