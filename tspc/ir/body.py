"""The body of a fold as data: pieces between exchanges, the values that they pass on, and a
registry by structural key.

Sizes are sympy expressions over the program's symbols and `rows_of(i)`, the number of rows of
sequence i that a step computes on.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, TypeVar, overload

import sympy
import torch
from torch.types import IntLikeType

from tspc.base.hardware import HARDWARE, Hardware
from tspc.base.state import MODEL, remembered
from tspc.ir.layout import Layout
from tspc.ir.program import Node, Size, Type
from tspc.ir.spec import AttentionSpec, Operands
from tspc.ir.text import declared, fields_of, textual
from tspc.seams.sizes import PythonReferenceAnalysis, sympy_interp

textual(Hardware)
Lengths = Mapping[sympy.Symbol, IntLikeType]  # of a call
Value = TypeVar("Value")
ROWS = sympy.Symbol("rows", positive=True, integer=True)
STEP = "step"  # of a piece: which shard, a tensor []


def rows_of(index: int) -> sympy.Symbol:
    """Rows of a sequence of the body; ROWS of the first."""
    return sympy.Symbol(f"rows{index}", positive=True, integer=True) if index else ROWS


def chunk_of(index: int) -> sympy.Symbol:
    """Rows of a chunk of a sequence of one rank's program: c of its layout."""
    return sympy.Symbol(f"c{index or ''}", positive=True, integer=True)


@textual
@dataclass(frozen=True)
class Extent:
    """A sequence: its length over the symbols, and the order in which the ranks hold it."""

    length: Size
    order: str

    def layout(self, ranks: int) -> Layout:
        return Layout(ranks, self.order)

    def chunk_rows(self, ranks: int, sizes: Lengths) -> IntLikeType:
        """C of the layout."""
        return self.layout(ranks).chunk_rows(evaluate(self.length, sizes))

    def rows(self, ranks: int, sizes: Lengths) -> IntLikeType:
        """Of one rank."""
        return self.layout(ranks).chunks * self.chunk_rows(ranks, sizes)


Named = dict[str, torch.Tensor]


@textual
@dataclass(frozen=True)
class Token:
    """An operand with a sequence, the index of the body's: its dim is lead * S * trail.

    whole: given whole, each rank takes its rows.
    """

    name: str
    dim: int
    lead: Size
    whole: bool
    sequence: int = 0


@textual
@dataclass(frozen=True)
class Piece:
    """What runs between two exchanges: nodes on one shard's tensors, which `tspc.ops.run` runs.

    saves: values made inside that the backward takes from the forward; it recomputes the others.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    nodes: tuple[Node, ...]
    saves: tuple[str, ...] = ()


@textual
@dataclass(frozen=True)
class Attention:
    """An attention between two pieces: keys and values meet the queries of all ranks.

    operands: names of values; mask and data are whole on every rank, sinks those of the heads of
    one piece. queries, keys: their sequences.
    """

    operands: Operands[str]
    out: str
    lse: str
    spec: AttentionSpec
    queries: int = 0
    keys: int = 0


@textual
@dataclass(frozen=True)
class Out:
    """A result of a fold: its kind is "sum" over j, or "lse"/"stack": one block per j.

    dim, lead: where the sequence is.
    """

    name: str
    kind: str
    dim: int
    lead: Size
    differentiable: bool
    sequence: int = 0


@textual
@dataclass(frozen=True, eq=False)
class Body:
    """y = sum_j body(tokens, invariants, shard j). steps of pads only (j * units >= size) are
    skipped. Regions whose bodies have one text share it, under its hash."""

    symbols: tuple[sympy.Symbol, ...]
    extents: tuple[Extent, ...]  # its sequences
    ranks: int
    units: int
    size: int
    steps: tuple[Piece | Attention, ...]
    values: Mapping[str, Type]  # local shapes
    tokens: tuple[Token, ...]
    invariants: tuple[str, ...]
    shards: tuple[str, ...]
    outs: tuple[Out, ...]
    schedule: str = "auto"
    flops: Size = 0  # of the pieces' matrix products in one step's forward, over `sizes`
    inner: Size = 0  # elements of their results that stay inside
    spared: Size = 0  # of the FLOPs, those of products that are saved
    hardware: Hardware = HARDWARE["cpu"]
    reduce: torch.dtype | None = None  # what weight gradients add up in; None: fp32 or wider
    name: str = field(default="", compare=False)  # of a region
    compiled: dict[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def key(self) -> str:
        """What its compiled pieces and its schedule hang on; sizes are over the program's own
        symbols."""
        parts = (fields_of(self), *map(sympy.srepr, self.symbols), torch.__version__)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]

    def text(self) -> str:
        """Its symbols, and its fields. `tspc.ir.program.parts` reads it."""
        return f"{declared(self.sizes)}\nbody {self.name!r} {fields_of(self)}"

    @cached_property
    def sizes(self) -> tuple[sympy.Symbol, ...]:
        """What its shapes are over."""
        return (*self.symbols, *map(rows_of, range(len(self.extents))))

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        return tuple(s for s in self.steps if isinstance(s, Attention))

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(s for s in self.steps if isinstance(s, Piece))

    @cached_property
    def saves(self) -> tuple[str, ...]:
        """What the forward leaves for the backward, one block per j: attention's output and
        log-sum-exp, and what the pieces save."""
        attended = [n for a in self.attentions for n in (a.out, a.lse)]
        return (*attended, *(n for p in self.pieces for n in p.saves))

    @cached_property
    def weight_elements(self) -> int:
        """Of one shard, pads and duplicates included."""
        return sum(numel(self.values[s].shape, {}) for s in self.shards)

    def real_steps(self) -> int:
        """Steps with at least one real unit."""
        return min(self.ranks, -(-self.size // self.units))


# a body lives as long as a program that folds it
BODIES: weakref.WeakValueDictionary[str, Body] = remembered(MODEL, weakref.WeakValueDictionary())


def registered(bodies: Mapping[str, Body]) -> dict[str, Body]:
    """The same, by region, one object for each key: the ops find it by its key, and its compiled
    pieces with it."""
    return {name: BODIES.setdefault(b.key, b) for name, b in bodies.items()}


def recomputing(body: Body) -> Body:
    """The body whose backward recomputes everything."""
    steps = tuple(replace(s, saves=()) if isinstance(s, Piece) else s for s in body.steps)
    return replace(body, steps=steps, spared=0, compiled={})


def evaluate(size: Size, sizes: Mapping[sympy.Symbol, Value]) -> int | Value:
    """An int, or a SymInt where `sizes` holds SymInts."""
    if type(size) is int or not isinstance(size, sympy.Expr):
        return size
    values = tuple([sizes[s] for s in _symbols(size)])
    if all(type(v) is int for v in values):
        return _known(size, values)
    return _interpreted(size, values)


@lru_cache(maxsize=1 << 16)
def _symbols(size: sympy.Expr) -> tuple[sympy.Symbol, ...]:
    return tuple(sorted((s for s in size.free_symbols if isinstance(s, sympy.Symbol)), key=str))


def _interpreted(size: sympy.Expr, values: tuple[Value, ...]) -> int | Value:
    symbols = _symbols(size)
    if not symbols:
        return int(size) if size.is_integer else float(size)  # pyright: ignore[reportReturnType]
    return sympy_interp(PythonReferenceAnalysis, dict(zip(symbols, values)), size)


_known = lru_cache(maxsize=1 << 16)(_interpreted)  # the sizes of a call return at the next ones


@overload
def numel(shape: Sequence[Size], sizes: Mapping[sympy.Symbol, int]) -> int: ...


@overload
def numel(shape: Sequence[Size], sizes: Mapping[sympy.Symbol, Size]) -> Size: ...


def numel(shape: Sequence[Size], sizes: Mapping[sympy.Symbol, Size]) -> Size:
    n: Size = 1
    for s in shape:
        n = n * evaluate(s, sizes)
    return n


def symbol_values(
    body: Body, sizes: Sequence[Value], rows: Sequence[Value]
) -> dict[sympy.Symbol, Value]:
    """The symbols of a body at a call; rows: of each sequence in a step."""
    return dict(zip(body.sizes, (*sizes, *rows)))
