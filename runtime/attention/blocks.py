"""Which blocks of queries and keys an attention computes, and under which mask.

In: the predicate, the layout's chunks, data and a mask tensor. Out: runs of queries with their
blocks of keys: those that no query of the run sees are left out, those that all see need no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce

import torch

from tspc.ir.layout import Span
from tspc.ir.spec import AttentionSpec, Operands
from tspc.masks.predicate import Bounds, mask, truth
from tspc.ops.counter import kept_keys
from tspc.runtime.attention.facts import fact

Tensor = torch.Tensor
EDGE = 512  # queries of a run, and keys of what is looked at as one
LOW = -5e8  # beyond what scores and biases are


@dataclass(frozen=True)
class Meeting:
    """What one attention is, and the sequences that meet in it."""

    spec: AttentionSpec
    queries: Span
    keys: Span


@dataclass(frozen=True)
class Block:
    """Queries [q0, q1) of the local rows against keys [k0, k1) of the sequence.

    causal: it is square and on the diagonal, nothing else hides a key. checks: the predicates that
    hold for some of it only.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False
    checks: tuple[str, ...] = ()

    def of(self, mask: Tensor) -> Tensor:
        """Its part of a mask, which may be one row or one column for all."""
        if mask.shape[-2] != 1:
            mask = mask[..., self.q0 : self.q1, :]
        return mask[..., self.k0 : self.k1] if mask.shape[-1] != 1 else mask


@dataclass(frozen=True)
class Run:
    """Queries whose blocks are merged; first: the position of the first one."""

    q0: int
    q1: int
    first: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class View:
    """What a kernel takes beside queries, keys and values.

    factors: zero or 1 / (1 - p) for every weight. top: what is taken off the scores of each query
    after the mask is added, where they would be lost in it; zero for others. score: what is done to
    the scores before, as `tspc.masks.score`'s text. scale: of the products of queries and keys.
    first: the place of the first query on the diagonal. added: gets the gradient of the mask, which
    is added to the scores.
    """

    causal: bool = False
    mask: Tensor | None = None
    factors: Tensor | None = None
    top: Tensor | None = None
    score: str = ""
    scale: float = 1.0
    first: int = 0
    added: Tensor | None = None

    def rows(self, at: slice) -> View:
        """Of some of the queries."""

        def part(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[-2] == 1 else x[..., at, :]

        tensors = {n: part(getattr(self, n)) for n in ("mask", "factors", "top", "added")}
        return replace(self, first=self.first + at.start, **tensors)

    @property
    def is_plain(self) -> bool:
        """A fused kernel takes it."""
        unusual = self.factors, self.top, self.added
        return not self.score and all(x is None for x in unusual)


def _segments(c: int, chunks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first local row, past the last, position of the first) of adjacent chunks."""
    start = 0
    for i in range(1, len(chunks) + 1):
        if i == len(chunks) or chunks[i] != chunks[i - 1] + 1:
            yield start * c, i * c, chunks[start] * c
            start = i


@lru_cache(maxsize=256)
def _plain(causal: bool, c: int, s: int, chunks: tuple[int, ...]) -> list[Run]:
    """All of s keys, or those before: as large as they come."""
    runs = []
    for q0, q1, first in _segments(c, chunks):
        blocks = []
        if not causal:
            blocks.append(Block(q0, q1, 0, s))
        elif first:
            blocks.append(Block(q0, q1, 0, min(first, s)))
        if causal and first < s:
            blocks.append(Block(q0, q1, first, min(first + q1 - q0, s), True))
        runs.append(Run(q0, q1, first, tuple(blocks)))
    return runs


def _edge(m: Meeting) -> int:
    return min(EDGE, max(m.queries.rows, 64))


def counted(m: Meeting, chunks: tuple[int, ...]) -> tuple[int, int, int]:
    """(blocks that positions do not rule out, of how many, their edge)."""
    edge = _edge(m)
    runs = _known(m, chunks, edge)
    blocks = [-(-(b.k1 - b.k0) // edge) for run in runs for b in run.blocks]
    return sum(blocks), len(runs) * -(-m.queries.length // edge), edge


@lru_cache(maxsize=256)
def _known(m: Meeting, chunks: tuple[int, ...], edge: int) -> list[Run]:
    return list(_looked_at(m, chunks, edge, None))


def _looked_at(
    m: Meeting, chunks: tuple[int, ...], edge: int, bounds: Bounds | None
) -> Iterator[Run]:
    last = m.queries.length - 1
    for start, stop, first in _segments(m.queries.rows, chunks):
        for q0 in range(start, stop, edge):
            q1 = min(q0 + edge, stop)
            at = first + q0 - start
            queries = min(at, last), min(at + q1 - q0 - 1, last)
            blocks: list[Block] = []
            for k0 in range(0, m.keys.length, edge):
                k1 = min(k0 + edge, m.keys.length)
                checks = _checks(m, queries, (k0, k1 - 1), bounds)
                if checks is None:
                    continue
                before = blocks[-1] if blocks else None
                if before is not None and before.k1 == k0 and before.checks == checks:
                    k0 = blocks.pop().k0
                blocks.append(Block(q0, q1, k0, k1, False, checks))
            yield Run(q0, q1, at, tuple(blocks))


def _checks(
    m: Meeting, queries: tuple[int, int], keys: tuple[int, int], bounds: Bounds | None
) -> tuple[str, ...] | None:
    """The predicates to evaluate on a block, None where it is empty."""
    out = []
    for text in m.spec.texts:
        answer = truth(text, queries, keys, m.spec.sizes, bounds)
        if answer is False:
            return None
        if answer is None:
            out.append(text)
    return tuple(out)


def _bounds(data: Tensor) -> Bounds | None:
    return fact(Bounds, [data], lambda: Bounds(data), None)


@lru_cache(maxsize=1024)
def _sees_none(m: Meeting, run: Run) -> bool:
    """Whether for some query of a run all keys are hidden, where positions tell."""
    q = torch.arange(run.first, run.first + run.q1 - run.q0).clamp(max=m.queries.length - 1)
    keep = [mask(t, q, torch.arange(m.keys.length), m.spec.sizes, None) for t in m.spec.texts]
    return bool(keep) and not bool(reduce(torch.logical_and, keep).any(-1).all())


@dataclass(frozen=True)
class Blocks:
    """The runs of one attention on one rank."""

    meeting: Meeting
    operands: Operands[Tensor]
    chunks: tuple[int, ...]

    @property
    def spec(self) -> AttentionSpec:
        return self.meeting.spec

    def runs(self) -> Iterator[tuple[Run, Tensor | None]]:
        """Each run, and what is taken off its scores, if anything is."""
        m, spec, x = self.meeting, self.meeting.spec, self.operands
        if not spec.predicate and not (spec.causal and x.mask is not None) and not spec.fill:
            runs = _plain(spec.causal, m.queries.rows, m.keys.length, self.chunks)
        elif x.data is not None:
            runs = _looked_at(m, self.chunks, _edge(m), _bounds(x.data))
        else:
            runs = _known(m, self.chunks, _edge(m))
        for run in runs:
            top = self._top(run)
            yield (run if top is None else replace(run, blocks=(self._whole(run),))), top

    def view(self, run: Run, b: Block, top: Tensor | None, wide: torch.dtype) -> View:
        """Of one block."""
        factors, states, p = None, self.operands.states, self.spec.dropout
        if states is not None:
            kept = kept_keys(states[:, :, b.q0 : b.q1], b.k0, b.k1, p)
            factors = kept.to(wide) * (1.0 / (1.0 - p) if p < 1 else 0.0)
        keep, operand = self._keep(run, b), self._operand(b)
        if top is not None:
            combined = self._total(keep, operand)
        elif keep is None or operand is None:
            combined = operand if keep is None else keep
        elif operand.dtype == torch.bool:
            combined = keep & operand
        else:
            combined = operand.masked_fill(~keep, -torch.inf)
        scale = self.spec.factor(self.operands.q.shape[-1])
        return View(b.causal, combined, factors, top, self.spec.score, scale)

    def _whole(self, run: Run) -> Block:
        return Block(run.q0, run.q1, 0, self.meeting.keys.length, False, self.spec.texts)

    def _keep(self, run: Run, b: Block) -> Tensor | None:
        """[b or 1, 1, queries, keys]: the predicates that hold for some of the block only."""
        if not b.checks:
            return None
        q = torch.arange(b.q0 - run.q0, b.q1 - run.q0, device=self.operands.q.device) + run.first
        q = q.clamp(max=self.meeting.queries.length - 1)
        k = torch.arange(b.k0, b.k1, device=self.operands.q.device)
        parts = [mask(t, q, k, self.spec.sizes, self.operands.data) for t in b.checks]
        return reduce(torch.logical_and, parts)

    def _operand(self, b: Block) -> Tensor | None:
        """The mask tensor on a block."""
        whole = self.operands.mask
        return None if whole is None else b.of(whole)

    def _total(self, keep: Tensor | None, operand: Tensor | None) -> Tensor:
        """All that is added to the scores, in fp64 if the mask is, else fp32."""
        parts = [] if operand is None else [(operand, -torch.inf)]
        parts += [] if keep is None else [(keep, self.spec.fill)]
        added = []
        for x, fill in parts:
            if x.dtype == torch.bool:
                x = torch.zeros_like(x, dtype=torch.float32).masked_fill(~x, fill)
            added.append(x.to(torch.promote_types(x.dtype, torch.float32)))
        return added[0] if len(added) == 1 else added[0] + added[1]

    @cached_property
    def _is_low(self) -> bool:
        """The mask tensor alone may be all that a query sees of a score."""
        x = self.operands.mask
        if x is None or x.dtype == torch.bool:
            return x is not None
        return bool((x <= LOW).any())

    def _top(self, run: Run) -> Tensor | None:
        """[b or 1, h or 1, queries, 1]: the greatest number that is added to a score of a query, if
        for some it is low."""
        m, fill = self.meeting, self.spec.fill
        if not fill:
            return None
        read = [x for x in (self.operands.mask, self.operands.data) if x is not None]
        if read:
            low = fact((m, run), read, lambda: self._has_low(run), False)
        else:
            low = fill <= LOW and _sees_none(m, run)
        if not low:
            return None
        top = self._most(run)
        return torch.where(top <= LOW, top, 0.0)

    def _has_low(self, run: Run) -> bool:
        keep = self._keep(run, self._whole(run))
        if not self._is_low and (keep is None or bool(keep.any(-1).all())):
            return False
        return bool((self._most(run) <= LOW).any())

    def _most(self, run: Run) -> Tensor:
        """The greatest number that is added to a score, of each query."""
        b = self._whole(run)
        return self._total(self._keep(run, b), self._operand(b)).amax(-1, keepdim=True)
