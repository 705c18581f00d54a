"""What one attention is, as data: the fields of its op, and its operands, which are refs in a
program, names in a body and tensors on a rank. `tspc.ops.attention` makes both of a node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from tspc.ir.text import textual

T = TypeVar("T")
U = TypeVar("U")
CAUSAL = "(q >= k)"


@textual
@dataclass(frozen=True)
class Operands(Generic[T]):
    """q [b, hq, n, d]; k, v [b, hk, m, d]; mask [b, hq, n, m] or what broadcasts to it, a bool or
    added; states [b, hq, n]: of the queries, where keys are dropped; data [b, rows, n]: what the
    predicate reads; sinks [hq].
    """

    q: T
    k: T
    v: T
    mask: T | None = None
    states: T | None = None
    data: T | None = None
    sinks: T | None = None

    @property
    def all(self) -> tuple[T | None, ...]:
        return self.q, self.k, self.v, self.mask, self.states, self.data, self.sinks

    @property
    def args(self) -> tuple[T | None, ...]:
        """As the op takes them, up to the last that there is."""
        count = max(i for i, x in enumerate(self.all) if x is not None) + 1
        return self.all[:count]

    def map(self, fn: Callable[[T], U]) -> Operands[U]:
        others = (None if x is None else fn(x) for x in self.all[3:])
        return Operands(fn(self.q), fn(self.k), fn(self.v), *others)


@textual
@dataclass(frozen=True)
class AttentionSpec:
    """The fields of attention's op. A mask, `causal` and the predicate hold together.

    scale: None is 1 / sqrt(d). dropout: with which probability a key is dropped. predicate, sizes:
    text and sizes of `tspc.masks.predicate`; "" is no predicate. fill: what is added to a score
    where the predicate is false, in a softmax that is as the model has it: NaN for a query of
    nothing but -inf, the mean of all values where all scores are lost in a low number. 0: as
    torch's op, which gives zeros for a query without a key. score: what is done to a score before,
    as text of `tspc.masks.score`. grouped: k and v have fewer heads than q.
    """

    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0
    predicate: str = ""
    fill: float = 0.0
    score: str = ""
    grouped: bool = False
    sizes: tuple[Any, ...] = ()

    @property
    def all(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    @property
    def kwargs(self) -> dict[str, Any]:
        """What is not as it is by itself."""
        return {f.name: x for f, x in zip(fields(self), self.all) if x != f.default}

    @property
    def texts(self) -> tuple[str, ...]:
        """The predicates that hold together."""
        return (*((CAUSAL,) if self.causal else ()), *((self.predicate,) if self.predicate else ()))

    def factor(self, width: Any) -> float:
        """Of the scores of keys of so many elements."""
        return float(width) ** -0.5 if self.scale is None else self.scale


# the same as ops have them
OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? states, Tensor? data"
FIELDS = (
    "bool causal, float? scale, float dropout, str predicate, float fill, str score, bool grouped, "
    "SymInt[] sizes"
)
