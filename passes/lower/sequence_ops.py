"""What one rank runs of an op along the sequence: the op on its chunks, with rows of its
neighbours."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.types import IntLikeType

from tspc.factors.factor import Factor, Factors
from tspc.ir.binding import bind
from tspc.ir.kinds import ALONG, PADS
from tspc.ir.program import Node
from tspc.ops.library import local_rows
from tspc.ops.sequence import SEQUENCE_CONV
from tspc.passes.analyse.factorize import Record
from tspc.passes.lower.run_op import Get

aten, tspc = torch.ops.aten, torch.ops.tspc
# (dim, lead, trail, rows, length, order, axis) of a sequence, as tspc's ops take it
Geometry = tuple[int, IntLikeType, IntLikeType, IntLikeType, IntLikeType, str, str]


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


def run(n: Node, sequence: Geometry, get: Get) -> torch.Tensor:
    """On the rows of the sequence that are here."""
    return _Run(n, sequence, get).run()


class _Run:
    """One op on the tiles of a rank's part (see `tspc.ops.sequence`)."""

    def __init__(self, n: Node, sequence: Geometry, get: Get):
        self.node, self.sequence, self.get = n, sequence, get
        self.args, _ = bind(n)
        self.dim, self.lead, trail, rows, _, self.order, self.axis = sequence
        self.tiles, self.width = self.lead * local_rows(1, self.order), rows * trail

    def run(self) -> torch.Tensor:
        op = self.node.op
        x = self.get(self.node.args[0])
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

    def extend(self, x: torch.Tensor, left: int, right: int, way: str) -> torch.Tensor:
        return tspc.extend(x, left, right, way, *self.sequence)

    def parts(self, x: torch.Tensor) -> torch.Tensor:
        """A dim of tiles, and one of their elements."""
        d = self.dim
        return x.reshape(*x.shape[:d], self.tiles, self.width, *x.shape[d + 1 :])

    def convolution(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.get(self.args["weight"]), self.args["bias"]
        bias = None if bias is None else self.get(bias)
        left, dilation = self.args["left"], self.args["dilation"]
        reach = dilation * (weight.shape[2] - 1)
        if reach:
            x = self.extend(x, left, reach - left, "zeros")
        groups = self.args["groups"] or x.shape[1]
        return tspc.tile_conv(x, weight, bias, dilation, groups, self.tiles, self.axis)

    def running_sum(self, x: torch.Tensor) -> torch.Tensor:
        """In fp32 or wider, rounded once."""
        dtype = self.node.type.dtype
        wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
        x = tspc.clear_pads(x.to(dtype).to(wide), *self.sequence)
        shape, d, x = x.shape, self.dim, self.parts(x)
        before = tspc.carry(x.sum(d + 1), d, self.lead, False, self.order, self.axis)
        return (x.cumsum(d + 1) + before.unsqueeze(d + 1)).reshape(shape).to(dtype)

    def flipped(self, x: torch.Tensor) -> torch.Tensor:
        others = [d for d in self.args["dims"] if d % x.dim() != self.dim]
        turned = self.parts(self.extend(x, 0, 0, "mirror")).flip(self.dim + 1).reshape(x.shape)
        return turned.flip(others) if others else turned

    def rolled(self, x: torch.Tensor) -> torch.Tensor:
        for by, d in zip(self.args["shifts"], self.args["dims"]):
            here = d % x.dim() == self.dim
            x = self.extend(x, by, -by, "wrap") if here else x.roll(by, d)
        return x

    def shifted(self, x: torch.Tensor) -> torch.Tensor:
        """The pads of other dims are laid as they are."""
        pads, at = list(self.args["pad"]), 2 * (x.dim() - 1 - self.dim)
        by, pads[at], pads[at + 1] = pads[at], 0, 0
        x = self.extend(x, by, -by, "zeros")
        return torch.nn.functional.pad(x, pads) if any(pads) else x
