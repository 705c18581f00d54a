"""Where a rank stands: its axis, its replicas, the process groups between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from tspc.base.state import GROUP, remembered
from tspc.runtime.comm import replicas
from tspc.runtime.comm.drivers import distributed
from tspc.runtime.comm.requests import Axis, Steps


@dataclass(frozen=True)
class Place:
    """A rank's place on an axis and the process groups of its links; its place among the replicas
    of a data-parallel axis; the one-dim mesh of the axis; the default group that all were made
    over."""

    axis: Axis
    groups: Mapping[str, dist.ProcessGroup] = field(default_factory=dict)
    replicas: Axis | None = None
    mesh: Any = None
    world: Any = None

    def from_first_replica(self, x: torch.Tensor) -> torch.Tensor:
        """The first replica's value."""
        if self.replicas is None or x.is_meta:
            return x
        out, group = x.contiguous(), self.groups["replicas"]
        dist.broadcast(out, dist.get_global_rank(group, 0), group)
        return out

    def gather(
        self, parts: Sequence[torch.Tensor], dims: Sequence[int], sizes: Sequence[int]
    ) -> list[torch.Tensor]:
        """The chunks of `sizes` rows of what is cut over the replicas too."""
        if self.replicas is None or not parts:
            return list(parts)
        steps = replicas.gather(self.replicas, parts, dims, sizes)
        return self._among_replicas(steps, "the gathering of weights over the replicas")

    def mean(
        self,
        grads: Sequence[Any],
        dims: Sequence[int | None],
        reduce: torch.dtype | None = None,
    ) -> list[Any]:
        """The gradients (None: none) averaged over the replicas; with a dim, this rank's part
        only."""
        out = list(grads)
        if self.replicas is None:
            return out
        cut, kept = (
            [i for i, g in enumerate(grads) if g is not None and (dims[i] is not None) is whether]
            for whether in (True, False)
        )
        sliced = [grads[i] for i in cut], [d for i in cut if (d := dims[i]) is not None]
        for at, steps in (
            (cut, replicas.scatter_mean(self.replicas, *sliced, reduce)),
            (kept, replicas.mean(self.replicas, [grads[i] for i in kept], reduce)),
        ):
            what = "the mean of gradients over the replicas"
            for i, g in zip(at, self._among_replicas(steps, what)):
                out[i] = g
        return out

    def _among_replicas(self, steps: Steps, what: str) -> Any:
        assert self.replicas is not None
        return distributed(steps, self.replicas, {"replicas": self.groups["replicas"]}, what)


PLACES: dict[str, Place] = remembered(GROUP, {})


def chunk_rows(axis: Axis, size: int) -> int:
    """Rows of this rank's chunk, as torch cuts."""
    chunk = -(-size // axis.size)
    return max(0, min(chunk, size - axis.rank * chunk))
