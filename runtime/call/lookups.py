"""Ids and labels lie in their tables: checked whole, before a call sends or computes anything else,
so that all ranks end alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
import torch.distributed as dist

from tspc.base.errors import IndexRangeError
from tspc.ir.body import evaluate
from tspc.ir.program import CONSTANT, PLACEHOLDERS, Ref
from tspc.ops.library import LIB
from tspc.ops.lookup import Lookup, Lookups

LARGE = 1 << 22  # elements of an index above which torch's own kernels are left to check
VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
FEW = 512  # elements that a list compares sooner than numpy
KEPT = 256  # lengths whose indices are known to be in range
ADVICE = (
    "look for a tokenizer or labels of another vocabulary, padding that is not the loss's "
    "ignore_index, or a sequence that is longer than a table of positions"
)
# the name of a value, the op that makes it, with what
Step = tuple[str, Callable[..., object], Sequence[object], Mapping[str, object]]


@dataclass(frozen=True)
class Lengthwise:
    """What is done for calls of the same lengths: ops that make the indices, what is checked."""

    ops: Sequence[Step]
    checks: Sequence[tuple[Lookup, int]]

    @cached_property
    def ranges(self) -> Mapping[str, tuple[int, int]] | None:
        """The least and the largest that each input may hold, if what inputs hold says all."""
        ranges: dict[str, tuple[int, int]] = {}
        for lookup, size in self.checks:
            elements, first = lookup.elements, -size if lookup.wraps else 0
            if elements is None or any(not first <= v < size for v in elements.constants):
                return None
            least, most = ranges.get(elements.input, (first, size - 1))
            ranges[elements.input] = max(least, first), min(most, size - 1)
        return ranges

    def in_range(self, inputs: Mapping[str, object]) -> bool:
        """Whether the extremes of inputs on the CPU say so for all that is looked up; if not, the
        indices themselves have to be seen."""
        if self.ranges is None:
            return False
        for name, (least, most) in self.ranges.items():
            x = inputs[name]
            if type(x) is not torch.Tensor or not x.is_cpu:
                return False
            array = x.numpy()
            if not array.size:
                return False
            values = array.ravel().tolist() if array.size <= FEW else (array.min(), array.max())
            if min(values) < least or max(values) > most:
                return False
        return True

    def values(self, inputs: Mapping[str, object]) -> dict[str, Any]:
        """By name; an op's operands are values, or as they are."""
        values = dict(inputs)
        for name, op, args, kwargs in self.ops:
            filled = {k: _filled(a, values) for k, a in kwargs.items()}
            values[name] = op(*[_filled(a, values) for a in args], **filled)
        return values


def _filled(a: object, values: Mapping[str, Any]) -> Any:
    if isinstance(a, Ref):
        value = values[a.name]
        return value[a.item or 0] if isinstance(value, (list, tuple)) else value
    return [_filled(x, values) for x in a] if isinstance(a, list) else a


class Indices:
    """Called with the sizes of a call and its inputs by name; -> what to raise, if anything.

    On an accelerator nothing waits: an index that is out of range ends the device's work with an
    assertion. What hangs on the lengths only is checked once for each.
    """

    def __init__(self, lookups: Lookups, device: torch.device):
        self.lookups, self.device = lookups, device
        self.plans: dict[tuple[int, ...], Lengthwise] = {}

    def __call__(
        self, sizes: Mapping[sympy.Symbol, int], inputs: Mapping[str, object]
    ) -> IndexRangeError | None:
        lengths = tuple(sizes.values())
        planned = self.plans.get(lengths)
        plan = planned or self._plan(sizes, inputs, self.lookups.listed)
        if planned is not None and plan.in_range(inputs):
            return None
        with torch.no_grad():
            values = plan.values(inputs)
            for lookup, size in plan.checks:
                wrong = self._check(lookup, _filled(lookup.index, values), size)
                if wrong is not None:
                    return wrong
        if planned is None:
            if len(self.plans) >= KEPT:
                self.plans.clear()
            again = [lookup for lookup, _ in plan.checks if lookup.of]
            self.plans[lengths] = self._plan(sizes, inputs, again)
        return None

    def _plan(
        self,
        sizes: Mapping[sympy.Symbol, int],
        inputs: Mapping[str, object],
        lookups: Sequence[Lookup],
    ) -> Lengthwise:
        checks, ops = [], dict[str, Step]()
        for lookup in lookups:
            count = math.prod(int(evaluate(n, sizes)) for n in lookup.shape)
            if count and (count <= LARGE or lookup.ours):
                checks.append((lookup, int(evaluate(lookup.size, sizes))))
                self._add(lookup.index, sizes, inputs, ops)
        return Lengthwise(list(ops.values()), checks)

    def _add(
        self,
        ref: Ref,
        sizes: Mapping[sympy.Symbol, int],
        inputs: Mapping[str, object],
        ops: dict[str, Step],
    ) -> None:
        """The ops that make a value, operands first."""
        if ref.name in inputs or ref.name in ops:
            return
        node = self.lookups.nodes[ref.name]
        assert node.op not in PLACEHOLDERS, f"{ref.name} is not given"
        if node.op == CONSTANT:
            value = torch.tensor(
                node.kwargs["value"], dtype=node.type.dtype, device=self.device
            ).reshape([int(n) for n in node.type.shape])
            ops[ref.name] = ref.name, torch.clone, [value], {}
            return
        for operand in node.refs():
            self._add(operand, sizes, inputs, ops)
        args = [_sized(a, sizes) for a in node.args]
        kwargs = {k: _sized(a, sizes) for k, a in node.kwargs.items()}
        # the clone that made it viewable may be gone
        op, kept = (torch.reshape, args[:2]) if node.op in VIEWS else (node.op, args)
        ops[ref.name] = ref.name, op, kept, kwargs

    def _check(self, lookup: Lookup, index: torch.Tensor, size: int) -> IndexRangeError | None:
        of = f"made of {', '.join(lookup.of)}" if lookup.of else "that the model makes by itself"
        where = f"{lookup.source}: {lookup.op} in {lookup.table}"
        return _wrong(index, -size if lookup.wraps else 0, size, where, of)


def _wrong(
    index: torch.Tensor, first: int, size: int, where: str, of: str
) -> IndexRangeError | None:
    """What to raise for an index that is not in [first, size); on an accelerator nothing waits."""
    place = f"{where}, which takes {first} to {size - 1},"
    if index.device.type != "cpu":
        good = ((index >= first) & (index < size)).all()
        torch.ops.aten._assert_async.msg(good, f"{place} is given others. Do this: {ADVICE}")
        return None
    low, high = (int(x) for x in index.aminmax())
    if first <= low and high < size:
        return None
    value = low if low < first else high
    at: Sequence[int] = (index == value).nonzero()[0].tolist()
    return IndexRangeError(
        f"{place} is given {value} on rank {_rank()}, at {at} of an index {of}. Do this: {ADVICE}"
    )


def _in_range(index: torch.Tensor, size: int, where: str) -> torch.Tensor:
    wrong = _wrong(index, 0, size, where, "that the model computes") if index.numel() else None
    if wrong is not None:
        raise wrong
    return index.clone()


LIB.impl("in_range", _in_range, "CompositeExplicitAutograd")


def _sized(a: object, sizes: Mapping[sympy.Symbol, int]) -> object:
    if isinstance(a, (tuple, list)):
        return [_sized(x, sizes) for x in a]
    return evaluate(a, sizes) if isinstance(a, sympy.Expr) else a


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
