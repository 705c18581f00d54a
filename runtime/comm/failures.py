"""When another rank does not come: what failed is told with this rank, where it waited, for which
collective, and which ranks are missing.

Nothing here runs while all goes well.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from tspc.base.errors import RankFailureError
from tspc.seams.compiler import default_store

GRACE = 2.0  # seconds in which the other ranks may tell where they wait
KEY = "tspc/waits/"
# what torch, gloo and NCCL say of a transfer that did not happen
_COMMUNICATION = re.compile(r"gloo|nccl|time(d )?out|connection|broken pipe|socket", re.I)
ADVICE = (
    "read the log of a missing rank first: it raised, was killed, or runs other code than this "
    "rank; if it only was slow (compiling, loading data), give init_process_group a longer timeout"
)


class Lost(Exception):
    """A transfer did not happen. What passes it on may add where it was.

    peer: the rank in the group at the other end, where there is one.
    """

    def __init__(self, cause: Exception, collective: str, peer: int | None = None):
        super().__init__(str(cause))
        self.cause, self.collective, self.peer = cause, collective, peer
        self.places: list[str] = []


def lost(error: Exception, kind: type, link: str, peer: int | None = None) -> Exception:
    """`Lost` if the error came from communication, else the error."""
    if isinstance(error, dist.DistError) or _COMMUNICATION.search(str(error)):
        return Lost(error, f"{kind.__name__} of {link}", peer)
    return error


def failure(lost: Lost, what: str, group: dist.ProcessGroup | None) -> RankFailureError:
    """The error to raise; the other ranks are told where this one waited."""
    ranks = dist.get_process_group_ranks(group)
    me = dist.get_rank()
    where = ", ".join([what, *lost.places])
    peer = None if lost.peer is None else ranks[lost.peer]
    here = f"waits in {where} for {lost.collective}"
    others = _others(me, ranks, here if peer is None else f"{here} with rank {peer}")
    silent = [r for r in ranks if r != me and r not in others]
    missing = [peer] if peer in silent else silent
    facts = [f"rank {r} {text}" for r, text in sorted(others.items())]
    if missing:
        facts.insert(0, f"missing: {', '.join(f'rank {r}' for r in missing)}")
    reason = str(lost.cause).strip().splitlines()[0]
    return RankFailureError(
        f"rank {me} waited in {where} for {lost.collective}, which failed ({reason}); "
        f"{'; '.join(facts)}. Do this: {ADVICE}"
    )


@contextlib.contextmanager
def naming(what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """torch's own collectives inside: a rank that does not come is told alike."""
    try:
        yield
    except RuntimeError as e:
        fail(e, what, group, "a collective of torch's")


def fail(
    error: RuntimeError, what: str, group: dist.ProcessGroup | None, collective: str
) -> NoReturn:
    """Raises what is to be said of an error of a collective; it itself, if no transfer failed."""
    loss = lost(error, dist.ProcessGroup, "torch")
    if not isinstance(loss, Lost):
        raise error
    loss.collective = collective
    raise failure(loss, what, group) from error


def _others(me: int, ranks: Sequence[int], here: str) -> dict[int, str]:
    """Rank -> where it waits, of those that say so in time."""
    waits: dict[int, str] = {}
    try:
        store = default_store()
        before, left = store.timeout, time.monotonic() + GRACE
        store.set_timeout(timedelta(seconds=GRACE))
        try:
            store.set(f"{KEY}{me}", here)
            while len(waits) < len(ranks) - 1 and time.monotonic() < left:
                for r in ranks:
                    if r != me and r not in waits and store.check([f"{KEY}{r}"]):
                        waits[r] = store.get(f"{KEY}{r}").decode()
                time.sleep(0.05)
        finally:
            store.set_timeout(before)
    except RuntimeError:  # the rank that holds the store is gone too
        pass
    return waits
