"""The data that a predicate refers to, as one value [B or 1, n, S] of integers.

In: elements `At(value, *indices)` whose indices are the batch entry, numbers, and an expression of
one position. Out: the nodes that put the values of all of them in rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from tspc.base.context import Arguments
from tspc.ir.builder import Builder
from tspc.ir.program import Node, Ref, Size, Type
from tspc.masks.predicate import B, H, K, Q
from tspc.seams.tensors import OpOverload

aten = torch.ops.aten


@dataclass(frozen=True)
class _Source:
    """batch, position: the dims of the value that they index; at: of each other dim its index."""

    name: str
    batch: int | None
    position: int | None
    at: tuple[tuple[int, int], ...]


@dataclass
class Rows:
    """The rows of one predicate at a time; equal ones of several attentions are made once."""

    sources: list[_Source] = field(default_factory=list)
    done: dict[tuple[_Source, ...], Ref] = field(default_factory=dict)

    def start(self) -> None:
        """A predicate without data."""
        self.sources = []

    def place(self, at: Any, by_name: Mapping[str, Node], length: Size) -> int | None:
        """The number of the row that an element is of; None: it is of none."""
        name, *indices = at.args
        batch = position = None
        fixed = []
        for dim, e in enumerate(indices):
            if e == B and batch is None:
                batch = dim
            elif e.is_Integer:
                fixed.append((dim, int(e)))
            elif e.free_symbols & {B, H, Q, K} not in ({Q}, {K}) or position is not None:
                return None
            else:
                whole = by_name[name.name].type.shape[dim] == length
                if not whole and e not in (Q, K):
                    return None
                position = dim
        source = _Source(name.name, batch, position, tuple(fixed))
        if source not in self.sources:
            self.sources.append(source)
        return self.sources.index(source)

    def position(self, at: Any) -> Any:
        """Where in its row an element is."""
        others = [e for e in at.args[1:] if e.free_symbols & {Q, K}]
        return others[0] if others else sympy.Integer(0)

    def made(
        self, n: Node, by_name: Mapping[str, Node], batch: Size, length: Size
    ) -> tuple[list[Node], Ref | None]:
        """The nodes that make the rows before node n, and their value."""
        key = tuple(self.sources)
        if not key or key in self.done:
            return [], self.done.get(key)
        maker = _Maker(n, by_name)
        size = batch if any(s.batch is not None for s in key) else 1
        parts = [maker.row(s, by_name[s.name].type, size, length) for s in key]
        if len(parts) > 1:
            maker.emit(aten.cat.default, (tuple(parts), 1), (size, len(parts), length))
        self.done[key] = Ref(maker.b.nodes[-1].name)
        return maker.b.nodes, self.done[key]


class _Maker:
    """Nodes in the place of one."""

    def __init__(self, n: Node, by_name: Mapping[str, Node]):
        self.b = Builder(dict(by_name))
        self.b.at(n)

    def emit(
        self,
        op: OpOverload,
        args: Arguments,
        shape: Sequence[Size],
        dtype: torch.dtype = torch.int64,
    ) -> Ref:
        return self.b.of(op, args, shape, dtype, f"rows{len(self.b.nodes)}")

    def row(self, s: _Source, t: Type, batch: Size, length: Size) -> Ref:
        """[batch, 1, length] of one source."""
        x, shape = Ref(s.name), list(t.shape)
        if t.dtype != torch.int64:
            x = self.emit(aten.to.dtype, (x, torch.int64), shape)
        for dim, at in reversed(s.at):
            del shape[dim]
            x = self.emit(aten.select.int, (x, dim, at), shape)
        if s.batch is not None and s.position is not None and s.batch > s.position:
            shape.reverse()
            x = self.emit(aten.transpose.int, (x, 0, 1), shape)
        if s.batch is None:
            shape.insert(0, 1)
            x = self.emit(aten.unsqueeze.default, (x, 0), shape)
        if s.position is None:
            shape.append(1)
            x = self.emit(aten.unsqueeze.default, (x, -1), shape)
        elif shape[-1] != length:
            shape[-1] = length
            x = self.emit(aten.slice.Tensor, (x, -1, 0, length), shape)
        shape.insert(1, 1)
        x = self.emit(aten.unsqueeze.default, (x, 1), shape)
        return self.emit(aten.expand.default, (x, (batch, 1, length)), (batch, 1, length))
