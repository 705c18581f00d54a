"""Make a replicated value on this rank's rows only: its operands are cut, not its result.

In: a mask [.., queries, keys] that every rank could make whole. Out: nodes that make the rows of
the local queries, so that no rank holds [S, S]. What is not element by element is cut where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from tspc.factors.factor import Dims, Factor, Factors
from tspc.factors.notation import pointwise
from tspc.factors.registry import COMPUTED
from tspc.ir.program import Node, Ref, Type
from tspc.passes.analyse.factorize import EXTRA_POINTWISE, Record

aten = torch.ops.aten
EXPANDS = (aten.expand.default, aten.broadcast_to.default)
# (value, its dims with the sequence) -> the value cut by a conversion
Convert = Callable[[Ref, Dims], Ref]


class Cutter:
    """cut(value, k) -> the value on this rank's rows of dim k; one result per value and dim."""

    def __init__(
        self,
        factors: Factors,
        leaf: Factor,
        nodes: Mapping[str, Node],
        convert: Convert,
        emit: Callable[[Node, Record], Ref],
    ):
        self.factors, self.leaf, self.nodes = factors, leaf, nodes
        self.convert, self.emit = convert, emit
        self.done: dict[tuple[Ref, int], Ref] = {}

    def cut(self, ref: Ref, k: int) -> Ref:
        """k: the dim of the value that is the sequence."""
        if (ref, k) not in self.done:
            self.done[ref, k] = self._cut(ref, k)
        return self.done[ref, k]

    def _cut(self, ref: Ref, k: int) -> Ref:
        node = self.nodes[ref.name]
        operands = None
        if node.is_call and len(node.types) == 1 and len(node.type.shape) > 1:
            operands = self._dims_of_operands(node, k)
        if operands is None:
            return self.convert(ref, self._dims(self._type(ref), k))
        cut = {r: r if j is None else self.cut(r, j) for r, j in operands.items()}
        rows = replace(node.map_refs(lambda r: cut[r]), name=f"{node.name}.rows{k}")
        ins = [self._dims(self._type(r), operands[r]) for r in node.refs()]
        outs = [self._dims(node.type, k)]
        return self.emit(rows, Record(0, rows, [*rows.refs()], ins, outs, []))

    def _dims_of_operands(self, node: Node, k: int) -> dict[Ref, int | None] | None:
        """The dim of each operand that is dim k of the result, None where it is broadcast."""
        rank = len(node.type.shape)
        if node.op == aten.unsqueeze.default:
            at = node.args[1] % rank
            return None if k == at else {node.args[0]: k - (k > at)}
        if node.op == aten.transpose.int:
            a, b = (d % rank for d in node.args[1:3])
            return {node.args[0]: {a: b, b: a}.get(k, k)}
        tagged = node.op in EXTRA_POINTWISE or torch.Tag.pointwise in node.op.tags
        if not (tagged or COMPUTED.get(node.op) is pointwise or node.op in EXPANDS):
            return None
        out: dict[Ref, int | None] = {}
        for r in node.refs():
            shape = self._type(r).shape
            j = k - (rank - len(shape))
            out[r] = None if j < 0 or shape[j] == 1 else j
        return out

    def _type(self, ref: Ref) -> Type:
        t = self.nodes[ref.name].types[ref.item or 0]
        assert t is not None
        return t

    def _dims(self, t: Type, k: int | None) -> Dims:
        """Dims of a value with the sequence at k, the others of no consequence."""
        return tuple(
            (self.leaf,) if j == k else self.factors.dim(size) for j, size in enumerate(t.shape)
        )
