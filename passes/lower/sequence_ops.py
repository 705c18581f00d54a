"""What one rank runs of an op along the sequence: the op on its chunks, with rows of its
neighbours."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from tspc.factors.factor import Factor, Factors
from tspc.ir.binding import bind
from tspc.ir.builder import Builder
from tspc.ir.kinds import ALONG, PADS
from tspc.ir.program import Node, Ref, Size
from tspc.ops.library import local_rows
from tspc.ops.sequence import SEQUENCE_CONV
from tspc.passes.analyse.factorize import Record

aten, tspc = torch.ops.aten, torch.ops.tspc
# (dim, lead, trail, rows, length, order, axis) of a sequence, as tspc's ops take it
Geometry = tuple[int, Size, Size, Size, Size, str, str]


def runs(F: Factors, r: Record | None, leaves: Collection[Factor]) -> bool:
    """The op runs along a dim of its first operand that has the sequence, which is in no other."""
    return r is not None and any(_runs(F, r, leaf) for leaf in leaves)


def _runs(F: Factors, r: Record, leaf: Factor) -> bool:
    roles = {role for role, *_ in r.roles.get(leaf, ())}
    if len(roles) != 1 or not roles <= set(ALONG):
        return False
    if any(leaf in carried for carried in r.carried_in[1:]):
        return False
    dims = [[F.expand(tuple(d)) for d in x] for x in (r.ins[0], r.outs[0])]
    at = [[k for k, d in enumerate(x) if leaf in F.leaves(d)] for x in dims]
    return at[0] == at[1] and len(at[0]) == 1 and dims[0][at[0][0]].count(leaf) == 1


def lower(b: Builder, n: Node, shapes: Sequence[Sequence[Size]], along: Geometry) -> Ref:
    """The node at hand on the rows of the sequence that are here. shapes: of its operands, as they
    are here."""
    return _Lower(b, n, shapes, along).end()


class _Lower:
    """One op on the tiles of a rank's part (see `tspc.ops.sequence`)."""

    def __init__(self, b: Builder, n: Node, shapes: Sequence[Sequence[Size]], along: Geometry):
        self.b, self.node, self.along = b, n, along
        self.shape, self.shapes = tuple(shapes[0]), shapes
        self.args, _ = bind(n)
        self.dim, self.lead, trail, rows, _, self.order, self.axis = along
        self.tiles, self.width = self.lead * local_rows(1, self.order), rows * trail

    def end(self) -> Ref:
        op, x = self.node.op, self.node.args[0]
        if op == SEQUENCE_CONV:
            return self.convolution(x)
        if op == aten.cumsum.default:
            return self.running_sum(x)
        if op == aten.flip.default:
            return self.flipped(x)
        if op == aten.roll.default:
            return self.rolled(x)
        assert op in PADS
        return self.shifted(x)

    def extend(self, x: Ref, left: Size, right: Size, way: str) -> Ref:
        return self.b.emit(tspc.extend.default, x, left, right, way, *self.along)

    def parts(self, x: Ref) -> Ref:
        """A dim of tiles, and one of their elements."""
        d = self.dim
        shape = (*self.shape[:d], self.tiles, self.width, *self.shape[d + 1 :])
        return self.b.emit(aten.reshape.default, x, shape)

    def convolution(self, x: Ref) -> Ref:
        weight, bias = self.args["weight"], self.args["bias"]
        left, dilation = self.args["left"], self.args["dilation"]
        reach = dilation * (self.shapes[1][2] - 1)
        if reach:
            x = self.extend(x, left, reach - left, "zeros")
        groups = self.args["groups"] or self.shape[1]
        flags = (dilation, groups, self.tiles, self.axis)
        return self.b.end(tspc.tile_conv.default, x, weight, bias, *flags)

    def running_sum(self, x: Ref) -> Ref:
        """In fp32 or wider, rounded once."""
        b, d, dtype = self.b, self.dim, self.node.type.dtype
        wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
        x = b.emit(aten.to.dtype, b.emit(aten.to.dtype, x, dtype), wide)
        x = self.parts(b.emit(tspc.clear_pads.default, x, *self.along))
        totals = b.emit(aten.sum.dim_IntList, x, (d + 1,))
        before = b.emit(tspc.carry.default, totals, d, self.lead, False, self.order, self.axis)
        running = b.emit(aten.cumsum.default, x, d + 1)
        both = b.emit(aten.add.Tensor, running, b.emit(aten.unsqueeze.default, before, d + 1))
        return b.end(aten.to.dtype, b.emit(aten.reshape.default, both, self.shape), dtype)

    def flipped(self, x: Ref) -> Ref:
        others = tuple(d for d in self.args["dims"] if d % len(self.shape) != self.dim)
        parts = self.parts(self.extend(x, 0, 0, "mirror"))
        turned = self.b.emit(aten.flip.default, parts, (self.dim + 1,))
        if not others:
            return self.b.end(aten.reshape.default, turned, self.shape)
        turned = self.b.emit(aten.reshape.default, turned, self.shape)
        return self.b.end(aten.flip.default, turned, others)

    def rolled(self, x: Ref) -> Ref:
        for by, d in zip(self.args["shifts"], self.args["dims"]):
            if d % len(self.shape) == self.dim:
                x = self.extend(x, by, -by, "wrap")
            else:
                x = self.b.emit(aten.roll.default, x, (by,), (d,))
        self.b.instead(Ref(self.node.name), x)
        return x

    def shifted(self, x: Ref) -> Ref:
        """The pads of other dims are laid as they are."""
        pads, at = list(self.args["pad"]), 2 * (len(self.shape) - 1 - self.dim)
        by, pads[at], pads[at + 1] = pads[at], 0, 0
        shifted = (x, by, -by, "zeros", *self.along)
        if not any(pads):
            return self.b.end(tspc.extend.default, *shifted)
        x = self.b.emit(tspc.extend.default, *shifted)
        return self.b.end(aten.constant_pad_nd.default, x, tuple(pads))
