"""Sequence layout: which global positions each rank of the axis holds.

Pure arithmetic, ints or SymInts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.types import IntLikeType


@dataclass(frozen=True)
class Layout:
    """A sequence of S rows over `ranks`, in equal chunks of c rows padded at the end
    (docs/design.md, "Layouts").

    "contiguous": rank r holds chunk r of D. "zigzag": rank r holds chunks r and 2D-1-r of 2D, so
    causal work is even.
    """

    ranks: int
    order: str = "contiguous"

    @property
    def chunks(self) -> int:
        """Chunks per rank."""
        return 2 if self.order == "zigzag" else 1

    def chunk_rows(self, length: IntLikeType) -> IntLikeType:
        """Rows per chunk (c) for a sequence of `length`; at least 2, because 1 specialises
        graphs."""
        n = self.ranks * self.chunks
        rows = torch.sym_max(2, (length + n - 1) // n)
        assert not isinstance(rows, float)
        return rows

    def chunk_ids(self, rank: int) -> list[int]:
        return [rank] if self.chunks == 1 else [rank, 2 * self.ranks - 1 - rank]

    def all_chunk_ids(self) -> list[int]:
        """Chunk ids in the order in which an all-gather over ranks delivers them."""
        return [g for r in range(self.ranks) for g in self.chunk_ids(r)]

    def positions(
        self, rank: int, rows: int, length: int, device: torch.device | None = None
    ) -> torch.Tensor:
        """Global position of each of the `chunks * rows` local rows, pads clamped to the last
        real row."""
        return self._rows(rank, rows, device).clamp(max=length - 1)

    def valid(
        self, rank: int, rows: int, length: int, device: torch.device | None = None
    ) -> torch.Tensor:
        """Bool per local row: not a pad."""
        return self._rows(rank, rows, device) < length

    def _rows(self, rank: int, rows: int, device: torch.device | None) -> torch.Tensor:
        parts = [
            torch.arange(g * rows, (g + 1) * rows, device=device) for g in self.chunk_ids(rank)
        ]
        return torch.cat(parts)

    def in_order(self, blocks: torch.Tensor, dim: int, rows: int) -> torch.Tensor:
        """[..., D * chunks * rows, ...] in rank order along `dim` -> in order, pads at the end."""
        if self.chunks == 1:
            return blocks
        parts = blocks.split(rows, dim)
        at = {g: i for i, g in enumerate(self.all_chunk_ids())}
        return torch.cat([parts[at[g]] for g in range(len(at))], dim)

    def by_rank(self, ordered: torch.Tensor, dim: int, rows: int) -> torch.Tensor:
        """The inverse of `in_order`."""
        if self.chunks == 1:
            return ordered
        parts = ordered.split(rows, dim)
        return torch.cat([parts[g] for g in self.all_chunk_ids()], dim)

    def whole(self, blocks: torch.Tensor, dim: int, rows: int, length: int) -> torch.Tensor:
        """Rank order -> the sequence in order, narrowed to `length`."""
        return self.in_order(blocks, dim, rows).narrow(dim, 0, length)

    def blocks(self, whole: torch.Tensor, dim: int, rows: int) -> torch.Tensor:
        """The transpose of `whole`: the sequence -> rank order, zero rows in place of pads."""
        n = self.ranks * self.chunks * rows
        if whole.shape[dim] < n:
            pad = list(whole.shape)
            pad[dim] = n - whole.shape[dim]
            whole = torch.cat([whole, whole.new_zeros(pad)], dim)
        return self.by_rank(whole, dim, rows)


@dataclass(frozen=True)
class Span:
    """A sequence on the ranks: its layout, c and S."""

    layout: Layout
    rows: int
    length: int

    @property
    def local(self) -> int:
        """Rows of a rank."""
        return self.layout.chunks * self.rows


@dataclass(frozen=True)
class Along:
    """A dim with a sequence, lead * S * trail, as ops are told it; any size may be a SymInt."""

    dim: int
    lead: int
    trail: int
    rows: int
    length: int
    order: str
    axis: str

    def span(self, ranks: int) -> Span:
        return Span(Layout(ranks, self.order), self.rows, self.length)
