"""Two drivers for the runtime's generators: real process groups, and D simulated ranks in
lockstep.

A generator yields a `Request` and is sent a handle; `handle.wait()` gives the answer. `record`
lists what was sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tspc.base.errors import RankMismatchError
from tspc.base.state import CALL, remembered
from tspc.runtime.comm import direct
from tspc.runtime.comm.direct import Received, Summed
from tspc.runtime.comm.ending import hold
from tspc.runtime.comm.failures import Lost, failure, lost
from tspc.runtime.comm.requests import (
    AllGather,
    AllReduce,
    AllToAll,
    Axis,
    Broadcast,
    Exchange,
    Handle,
    Reduce,
    ReduceScatter,
    Request,
    Result,
    Shift,
    Steps,
)

# of the links that share a group with another: what goes over one is never taken for the other's
TAGS = {"outputs": 1}

# torch 2.13 renamed them
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class Sent:
    """One communication as its rank issued it.

    elements: payload that leaves the rank, on average over ranks.
    """

    kind: str
    link: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    elements: float


_RECORDS: list[list[Sent]] = remembered(CALL, [])


@contextlib.contextmanager
def record() -> Iterator[list[Sent]]:
    """Collect every communication that this process issues (lockstep: of the first rank)."""
    sent: list[Sent] = []
    _RECORDS.append(sent)
    try:
        yield sent
    finally:
        _RECORDS[:] = [r for r in _RECORDS if r is not sent]  # another may be equal


def _note(request: Request, ranks: int) -> None:
    if not _RECORDS:
        return
    n, t = request.tensor.numel(), request.tensor
    others = (ranks - 1) / ranks
    if isinstance(request, AllGather):
        elements = others * n * ranks
    elif isinstance(request, (ReduceScatter, AllToAll, Broadcast, Reduce)):
        elements = others * n
    elif isinstance(request, AllReduce):
        elements = 2 * others * n
    else:
        elements = n
    sent = Sent(type(request).__name__, request.link, tuple(t.shape), t.dtype, elements)
    for r in _RECORDS:
        r.append(sent)


@dataclass
class _Done:
    """A handle whose answer is there already."""

    result: torch.Tensor | None

    def wait(self) -> torch.Tensor | None:
        return self.result


def distributed(
    steps: Steps[Result],
    axis: Axis,
    groups: Mapping[str, dist.ProcessGroup],
    what: str = "a collective",
) -> Result:
    """Run one rank's generator over process groups, one per link.

    what: where this is, for the message. Raises `RankFailureError` if another rank does not come.
    """
    try:
        with torch.no_grad():
            return _run(steps, axis, groups)
    except Lost as e:
        raise failure(e, what, next(iter(groups.values()))) from e.cause


def _run(steps: Steps[Result], axis: Axis, groups: Mapping[str, dist.ProcessGroup]) -> Result:
    handle: Handle | None = None
    while True:
        try:
            request = next(steps) if handle is None else steps.send(handle)
        except StopIteration as stop:
            return stop.value
        if axis.size == 1:
            handle = _Done(_answers([request])[0])
            continue
        _note(request, axis.size)
        try:
            handle = under_way = _issue(request, axis, groups[request.link])
        except RuntimeError as e:
            steps.throw(lost(e, type(request), request.link))
            raise
        under_way.kind, under_way.link = type(request), request.link


def _issue(request: Request, axis: Axis, group: dist.ProcessGroup) -> Received | Summed:
    x, ranks, rank = request.tensor.contiguous(), axis.size, axis.rank
    if isinstance(request, Broadcast):
        source = dist.get_global_rank(group, request.source)
        return _held(dist.broadcast(x, source, group, async_op=True), x)
    if isinstance(request, AllReduce):
        out = x.clone()
        return _held(dist.all_reduce(out, group=group, async_op=True), out)
    if isinstance(request, AllToAll):
        out = torch.empty_like(x)
        work = dist.all_to_all_single(out.view(-1), x.view(-1), group=group, async_op=True)
        return _held(work, out, x)
    if isinstance(request, Exchange):
        out = x.new_empty((sum(request.received), *x.shape[1:]))
        received, sent = list(request.received), list(request.sent)
        work = dist.all_to_all_single(out, x, received, sent, group, async_op=True)
        return _held(work, out, x)
    if isinstance(request, Reduce):
        target = dist.get_global_rank(group, request.target)
        work = dist.reduce(x, target, group=group, async_op=True)
        return _held(work, x if rank == request.target else None, x)
    if x.device.type == "cpu":
        return _issue_directly(request, x, axis, group)
    if isinstance(request, Shift):
        out = torch.empty_like(x)
        following = dist.get_global_rank(group, (rank + 1) % ranks)
        previous = dist.get_global_rank(group, (rank - 1) % ranks)
        transfers = [
            dist.P2POp(dist.isend, x, following, group),
            dist.P2POp(dist.irecv, out, previous, group),
        ]
        return Received(dist.batch_isend_irecv(transfers), out, x)
    if isinstance(request, AllGather):
        out = x.new_empty((ranks, *x.shape))
        work = _all_gather(out.view(-1), x.view(-1), group, async_op=True)
        return Received([_work(work)], out, x)
    assert isinstance(request, ReduceScatter)
    out = x.new_empty(x.shape[1:])
    work = _reduce_scatter(out.view(-1), x.view(-1), group=group, async_op=True)
    return Received([_work(work)], out, x)


def _held(work: object, result: torch.Tensor | None, sent: torch.Tensor | None = None) -> Received:
    """Of a collective that a thread of torch's runs."""
    hold(result, sent)
    return Received([_work(work)], result, sent)


def _work(x: object) -> dist.Work:
    """What torch gives for a collective that is waited for later."""
    assert isinstance(x, dist.Work)
    return x


def _issue_directly(
    request: Request, x: torch.Tensor, axis: Axis, group: dist.ProcessGroup
) -> Received | Summed:
    ranks, rank = axis.size, axis.rank
    if isinstance(request, Shift):
        return direct.shift(x, rank, ranks, group)
    if isinstance(request, AllGather):
        return direct.all_gather(x, rank, ranks, group, TAGS.get(request.link, 0))
    assert isinstance(request, ReduceScatter)
    return direct.reduce_scatter(x, rank, ranks, group)


def alone(steps: Steps[Result], axis: Axis) -> Result:
    """Run one rank's generator; what the others would send has its shape and no values."""
    handle: Handle | None = None
    with torch.no_grad():
        while True:
            try:
                request = next(steps) if handle is None else steps.send(handle)
            except StopIteration as stop:
                return stop.value
            if axis.size > 1:
                _note(request, axis.size)
            handle = _Done(_shaped(request, axis))


def _shaped(request: Request, axis: Axis) -> torch.Tensor | None:
    x = request.tensor.contiguous()
    if isinstance(request, Broadcast) and request.source == axis.rank:
        return x
    if isinstance(request, Reduce):
        return x if request.target == axis.rank else None
    if isinstance(request, AllGather):
        return x.new_empty((axis.size, *x.shape))
    if isinstance(request, ReduceScatter):
        return x.new_empty(x.shape[1:])
    if isinstance(request, Exchange):
        return x.new_empty((sum(request.received), *x.shape[1:]))
    return torch.empty_like(x)


def lockstep(generators: Sequence[Steps[Result]]) -> list[Result]:
    """Run all ranks' generators together; they must yield the same kinds and shapes in the same
    order."""
    ranks = len(generators)
    results: dict[int, Result] = {}
    handles: list[Handle] = []
    with torch.no_grad():
        while True:
            requests: list[Request] = []
            ended: list[int] = []
            for r, g in enumerate(generators):
                try:
                    requests.append(g.send(handles[r]) if handles else next(g))
                except StopIteration as stop:
                    results[r] = stop.value
                    ended.append(r)
            if ended:
                if requests:
                    raise RankMismatchError(f"ranks {ended} ended while others still communicate")
                return [results[r] for r in range(ranks)]
            _compare(requests)
            if ranks > 1:
                _note(requests[0], ranks)
            handles = [_Done(a) for a in _answers(requests)]


def _compare(requests: Sequence[Request]) -> None:
    def described(q: Request) -> tuple[object, ...]:
        peer = getattr(q, "source", getattr(q, "target", None))
        shape = tuple(q.tensor.shape)[isinstance(q, Exchange) :]  # rows differ by rank
        return type(q).__name__, q.link, shape, q.tensor.dtype, peer

    first = described(requests[0])
    for r, q in enumerate(requests):
        if described(q) != first:
            raise RankMismatchError(f"rank 0 issues {first}, rank {r} issues {described(q)}")


def _answers(requests: Sequence[Request]) -> list[torch.Tensor] | list[torch.Tensor | None]:
    tensors = [q.tensor for q in requests]
    first, ranks = requests[0], len(requests)
    if isinstance(first, Shift):
        return [tensors[(r - 1) % ranks].clone() for r in range(ranks)]
    if isinstance(first, Broadcast):
        return [tensors[first.source].clone() for _ in range(ranks)]
    if isinstance(first, Reduce):
        return [_total(tensors) if r == first.target else None for r in range(ranks)]
    if isinstance(first, AllReduce):
        return [_total(tensors) for _ in range(ranks)]
    if isinstance(first, AllGather):
        return [torch.stack(tensors) for _ in range(ranks)]
    if isinstance(first, ReduceScatter):
        return [_total([t[r] for t in tensors]) for r in range(ranks)]
    if isinstance(first, Exchange):
        parts = [q.tensor.split(q.sent) for q in requests]  # type: ignore[attr-defined]
        return [torch.cat([p[r] for p in parts]) for r in range(ranks)]
    assert isinstance(first, AllToAll)
    return [torch.stack([t[r] for t in tensors]) for r in range(ranks)]


def _total(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    out = tensors[0].clone()
    for t in tensors[1:]:
        out += t
    return out
