"""Rules of `tspc.ops.counter`'s ops: element by element in the first operand, each index along its
dim."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tspc.factors.factor import Dims
from tspc.factors.notation import Op
from tspc.factors.registry import computed
from tspc.ops import counter  # noqa: F401  defines the ops

tspc = torch.ops.tspc


@computed(tspc.dropout.default, tspc.uniform.default, tspc.normal.default)
def drawn(op: Op) -> Sequence[Dims]:
    """The operands are the value, the state, the index of every dim."""
    return [indexed(op, list(op.ins[0]))]


def indexed(op: Op, dims: Dims) -> Dims:
    op.event("whole", op.ins[1][0], 1, "a state")
    op.ins[2:] = [[d] for d in dims]
    return dims


@computed(tspc.query_states.default)
def query_states(op: Op) -> Sequence[Dims]:
    op.event("whole", op.ins[0][-1], 0, "a state for all features")
    return [indexed(op, list(op.ins[0][:-1]))]
