"""Ranks of one axis must get the same data: a 64-bit hash of the inputs is compared on the first
calls and now and then."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from tspc.runtime.drivers import distributed
from tspc.runtime.execute import Place
from tspc.runtime.requests import AllGather, Steps

from tspc.errors import RankMismatchError

FIRST, EVERY = 3, 100  # calls that "auto" checks


class Checker:
    """Called with the inputs of each call.

    mode: "auto", True (every call, floats too) or False.
    """

    def __init__(self, place: Place, mode: str | bool, names: Sequence[str]):
        self.place, self.mode, self.names, self.calls = place, mode, names, 0

    def __call__(self, tensors: Sequence[Any]) -> None:
        self.calls += 1
        if self.mode is False:
            return
        if self.mode == "auto" and self.calls > FIRST and self.calls % EVERY:
            return
        mine = digest(tensors, floats=self.mode is True)
        device = next((t.device for t in tensors if isinstance(t, torch.Tensor)), None)
        steps = _gather(torch.tensor([mine], dtype=torch.int64, device=device))
        found = distributed(steps, self.place.axis, self.place.groups).view(-1).tolist()
        wrong = [r for r, h in enumerate(found) if h != found[0]]
        if wrong:
            raise RankMismatchError(
                f"ranks {wrong} of axis {self.place.axis.name!r} were given other inputs than "
                "rank 0: all ranks of the "
                "TSP axis take the same, full batch; use one sampler seed (DistributedSampler "
                "with rank = the data-parallel rank)"
            )


def _gather(x: torch.Tensor) -> Steps:
    handle = yield AllGather(x)
    return handle.wait()


def digest(tensors: Sequence[Any], floats: bool) -> int:
    """A signed 64-bit hash of all shapes and of the integer (and float) contents."""
    h = hashlib.blake2b(digest_size=8)
    for t in tensors:
        if not isinstance(t, torch.Tensor):
            continue
        h.update(f"{tuple(t.shape)} {t.dtype}".encode())
        if floats or not t.dtype.is_floating_point:
            h.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(h.digest(), "little", signed=True)
