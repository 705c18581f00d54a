"""Shard maps: which rows of a whole weight each shard of a fold holds.

Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class ShardMap:
    """Which rows of a whole weight each shard of a fold holds.

    rows[j][i]: source row of `dim` at place i of shard j, -1 for zeros. real[j][i]: it is no pad.
    All shards are equally long. A pad that repeats a row has that row as its source; its gradient
    is discarded.
    """

    dim: int
    rows: tuple[tuple[int, ...], ...]
    real: tuple[tuple[bool, ...], ...]
    answers: dict[int, bool] = field(default_factory=dict, compare=False, repr=False)

    @property
    def length(self) -> int:
        """Rows of one shard."""
        return len(self.rows[0])

    def take(self, whole: torch.Tensor, j: int) -> torch.Tensor:
        """Shard j of a whole weight."""
        at = torch.tensor(self.rows[j], device=whole.device)
        shard = whole.index_select(self.dim, at.clamp(min=0))
        if bool((at < 0).any()):
            shape = [1] * whole.dim()
            shape[self.dim] = len(at)
            shard = torch.where((at < 0).view(shape), 0, shard)
        return shard.contiguous()

    def put(self, shards: Sequence[torch.Tensor], size: int) -> torch.Tensor:
        """The transpose of `take` over all shards: the whole gradient, pads discarded."""
        shape = list(shards[0].shape)
        shape[self.dim] = size
        whole = shards[0].new_zeros(shape)
        for rows, real, shard in zip(self.rows, self.real, shards):
            keep = [i for i, r in enumerate(real) if r]
            at = torch.tensor([rows[i] for i in keep], dtype=torch.long, device=shard.device)
            index = torch.tensor(keep, dtype=torch.long, device=shard.device)
            whole.index_add_(self.dim, at, shard.index_select(self.dim, index))
        return whole

    def is_chunked(self, size: int) -> bool:
        """The real rows of shard j are torch's chunk j of `size` rows, first in the shard."""
        if size not in self.answers:
            self.answers[size] = self._is_chunked(size)
        return self.answers[size]

    def _is_chunked(self, size: int) -> bool:
        n = -(-size // len(self.rows))
        if self.length != n:
            return False
        for j, (rows, real) in enumerate(zip(self.rows, self.real)):
            chunk = tuple(range(min(j * n, size), min((j + 1) * n, size)))
            if (
                rows[: len(chunk)] != chunk
                or any(real[len(chunk) :])
                or not all(real[: len(chunk)])
            ):
                return False
        return True


def chunked(dim: int, size: int, ranks: int) -> ShardMap:
    """Torch's chunks of a dim, padded with zeros to equal length."""
    n = -(-size // ranks)
    rows = tuple(
        tuple(i if i < size else -1 for i in range(j * n, (j + 1) * n)) for j in range(ranks)
    )
    return ShardMap(dim, rows, tuple(tuple(r >= 0 for r in row) for row in rows))
