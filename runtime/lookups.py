"""Ids and labels lie in their tables: checked whole, before a call sends or computes anything else,
so that all ranks end alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.distributed as dist

from tspc.body import evaluate
from tspc.errors import IndexRangeError
from tspc.lookup import Lookup, Lookups
from tspc.program import CONSTANT, PLACEHOLDERS, Ref

LARGE = 1 << 22  # elements of an index above which torch's own kernels are left to check
VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
KEPT = 256  # lengths whose indices are known to be in range
ADVICE = (
    "look for a tokenizer or labels of another vocabulary, padding that is not the loss's "
    "ignore_index, or a sequence that is longer than a table of positions"
)


class Indices:
    """Called with the sizes of a call and its inputs by name; -> what to raise, if anything.

    On an accelerator nothing waits: an index that is out of range ends the device's work with an
    assertion. What hangs on the lengths only is checked once for each.
    """

    def __init__(self, lookups: Lookups, device: torch.device):
        self.lookups, self.device = lookups, device
        self.good: set[tuple[int, ...]] = set()

    def __call__(
        self, sizes: Mapping[Any, int], given: Mapping[str, Any]
    ) -> IndexRangeError | None:
        lengths = tuple(sizes.values())
        known, values = lengths in self.good, dict(given)
        with torch.no_grad():
            for lookup in self.lookups.found:
                count = math.prod(int(evaluate(n, sizes)) for n in lookup.shape)
                small = 0 < count <= LARGE or lookup.own
                if not small or not count or (known and not lookup.of):
                    continue
                index = self._value(lookup.index, sizes, values)
                wrong = self._check(lookup, index, int(evaluate(lookup.size, sizes)))
                if wrong is not None:
                    return wrong
        if len(self.good) >= KEPT:
            self.good.clear()
        self.good.add(lengths)
        return None

    def _value(self, ref: Ref, sizes: Mapping[Any, int], values: dict[str, Any]) -> Any:
        if ref.name not in values:
            node = self.lookups.nodes[ref.name]
            assert node.op not in PLACEHOLDERS, f"{ref.name} is not given"
            if node.op == CONSTANT:
                made = torch.tensor(
                    node.kwargs["value"], dtype=node.type.dtype, device=self.device
                ).reshape([int(n) for n in node.type.shape])
            else:
                args = [self._argument(a, sizes, values) for a in node.args]
                kwargs = {k: self._argument(a, sizes, values) for k, a in node.kwargs.items()}
                # the clone that made it viewable may be gone
                made = args[0].reshape(args[1]) if node.op in VIEWS else node.op(*args, **kwargs)
            values[ref.name] = made
        made = values[ref.name]
        return made[ref.item or 0] if isinstance(made, (list, tuple)) else made

    def _argument(self, a: Any, sizes: Mapping[Any, int], values: dict[str, Any]) -> Any:
        if isinstance(a, Ref):
            return self._value(a, sizes, values)
        if isinstance(a, (tuple, list)):
            return [self._argument(x, sizes, values) for x in a]
        return evaluate(a, sizes) if isinstance(a, sympy.Expr) else a

    def _check(self, lookup: Lookup, index: torch.Tensor, size: int) -> IndexRangeError | None:
        first = -size if lookup.wraps else 0
        if index.device.type != "cpu":
            good = ((index >= first) & (index < size)).all()
            torch._assert_async(good, f"{_told(lookup, size)} is given others. Do this: {ADVICE}")
            return None
        low, high = (int(x) for x in index.aminmax())
        if first <= low and high < size:
            return None
        value = low if low < first else high
        at: Sequence[int] = (index == value).nonzero()[0].tolist()
        of = f"made of {', '.join(lookup.of)}" if lookup.of else "that the model makes by itself"
        return IndexRangeError(
            f"{_told(lookup, size)} is given {value} on rank {_rank()}, at {at} of an index {of}. "
            f"Do this: {ADVICE}"
        )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _told(lookup: Lookup, size: int) -> str:
    first = f"{-size} to " if lookup.wraps else "0 to "
    return f"{lookup.source}: {lookup.op} in {lookup.table}, which takes {first}{size - 1},"
