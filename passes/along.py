"""Ops along the sequence: the forms in which they are written, and what one rank runs.

`canonical` brings what keeps the length of a dim to one form: a convolution with its pads and the
slice of its result is `sequence_conv`, rows moved by a slice and zeros are a pad by (n, -n).
`run` is the op on a rank's chunks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch._ops import OpOverload
from torch.types import IntLikeType

from tspc.along import SEQUENCE_CONV
from tspc.context import Arguments
from tspc.factor import Factor, Factors
from tspc.notation import ALONG
from tspc.ops import local_rows
from tspc.passes.call import Get
from tspc.passes.factorize import Record, bind
from tspc.program import Node, Ref, Size, Type

aten, tspc = torch.ops.aten, torch.ops.tspc
PADS = (aten.pad.default, aten.constant_pad_nd.default)
CONVS = (aten.conv1d.default, aten.conv1d.padding)
ZEROS = (aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default)
Makers = Mapping[str, Node]
# (dim, lead, trail, rows, length, order, axis) of a sequence, as tspc's ops take it
Geometry = tuple[int, IntLikeType, IntLikeType, IntLikeType, IntLikeType, str, str]


def canonical(n: Node, made: Makers) -> list[Node]:
    """The node, or those that stand for it and what made its operand; the last has its name."""
    if n.op in CONVS or n.op == aten.slice.Tensor:
        conv = _convolution(n, made) or n
        return _product(conv, made) if conv.op == SEQUENCE_CONV else [conv]
    if n.op in PADS and n.type.is_float:  # masks are read as they are written
        return [_moved_by_pad(n, made) or n]
    if n.op == aten.cat.default and n.type.is_float:
        return [_moved_by_cat(n, made) or n]
    if n.op == aten.diff.default and n.type.is_float:
        return _difference(n, made)
    return [n]


def _type(made: Makers, r: Ref) -> Type:
    t = made[r.name].types[r.item or 0]
    assert t is not None
    return t


def _number(x: object) -> int | None:
    """A pair or list of one int, or the int."""
    if isinstance(x, (tuple, list)):
        x = x[0] if len(x) == 1 else None
    return x if isinstance(x, int) else None


def _range(n: Node, dim: int) -> tuple[int, Size] | None:
    """(rows left out in front, rows that are kept) of a slice along a dim."""
    args, _ = bind(n)
    start = args["start"] or 0
    if args["step"] != 1 or args["dim"] % len(n.type.shape) != dim or not isinstance(start, int):
        return None
    return (start, n.type.shape[dim]) if start >= 0 else None


def _convolution(n: Node, made: Makers) -> Node | None:
    """A convolution along the last dim, with zeros laid in front and behind, of which as many rows
    are kept as there were."""
    conv, skipped = n, 0
    if n.op == aten.slice.Tensor:
        conv = made[n.args[0].name]
        kept = _range(n, 2) if conv.op in CONVS and len(n.type.shape) == 3 else None
        if kept is None:
            return None
        skipped = kept[0]
    args, _ = bind(conv)
    x, weight = args["input"], args["weight"]
    size = _type(made, weight).shape[2]
    stride, dilation = _number(args["stride"]), _number(args["dilation"])
    if len(conv.type.shape) != 3 or stride != 1 or dilation is None or not isinstance(size, int):
        return None
    reach, padding = dilation * (size - 1), args["padding"]
    padding = {"same": reach // 2, "valid": 0}.get(padding) if isinstance(padding, str) else padding
    left = _number(padding)
    if left is None:
        return None
    source = made[x.name]
    laid = _laid(source) if source.op in PADS else None
    if laid is not None:
        x, left = source.args[0], left + laid[0]
    left -= skipped
    if n.type.shape[2] != _type(made, x).shape[2] or not 0 <= left <= reach:
        return None
    groups = 0 if _each_alone(made, x, weight) else args["groups"]
    args = (x, weight, args["bias"], left, dilation, groups)
    return replace(n, op=SEQUENCE_CONV, args=args, kwargs={})


def _product(n: Node, made: Makers) -> list[Node]:
    """A convolution that reads one row is a product of each row with the weight."""
    x, weight, bias, *_, groups = n.args
    w = _type(made, weight)
    if w.shape[2] != 1 or groups != 1:
        return [n]

    def node(name: str, op: OpOverload, args: Arguments, like: Type, *shape: object) -> Node:
        t = replace(like, shape=shape)
        return Node(f"{n.name}.{name}", op, args, {}, (t,), n.source)

    (b, o, s), c = n.type.shape, w.shape[1]
    rows = node("rows", aten.transpose.int, (x, 1, 2), _type(made, x), b, s, c)
    flat = node("weight", aten.view.default, (weight, (o, c)), w, o, c)
    given = (Ref(rows.name), Ref(flat.name), *([] if bias is None else [bias]))
    linear = node("linear", aten.linear.default, given, n.type, b, s, o)
    return [rows, flat, linear, replace(n, op=aten.transpose.int, args=(Ref(linear.name), 1, 2))]


def _each_alone(made: Makers, x: Ref, weight: Ref) -> bool:
    """One channel out for one channel in, of which there are more."""
    channels = _type(made, x).shape[1]
    return channels != 1 and _type(made, weight).shape[:2] == (channels, 1)


def _pad(n: Node) -> tuple[int, int, int] | None:
    """(dim, in front, behind) of a pad of zeros along one dim."""
    args, _ = bind(n)
    value = args.get("value") or 0
    pads = [(k, args["pad"][2 * k : 2 * k + 2]) for k in range(len(args["pad"]) // 2)]
    pads = [(k, p) for k, p in pads if tuple(p) != (0, 0)]
    if args.get("mode", "constant") != "constant" or value != 0 or len(pads) != 1:
        return None
    ((k, (lo, hi)),) = pads
    if not isinstance(lo, int) or not isinstance(hi, int):
        return None
    return len(n.type.shape) - 1 - k, lo, hi


def _laid(n: Node) -> tuple[int, int] | None:
    """Zeros in front and behind of the last of three dims."""
    found = _pad(n)
    if found is None or found[0] != 2 or len(n.type.shape) != 3 or min(found[1:]) < 0:
        return None
    return found[1:]


def _moved(n: Node, x: Ref, dim: int, by: int) -> Node:
    pads = (0, 0) * (len(n.type.shape) - 1 - dim) + (by, -by)
    return replace(n, op=aten.pad.default, args=(x, pads), kwargs={})


def _part(made: Makers, r: Ref, dim: int, by: int, like: Type) -> Ref | None:
    """What a value is all of the rows of, but for the last `by`, or the first -by."""
    n = made[r.name]
    if n.op != aten.slice.Tensor or len(n.type.shape) <= dim:
        return None
    source = _type(made, n.args[0])
    kept = _range(n, dim)
    same = source.shape == like.shape and source.dtype == like.dtype
    if not same or kept != (max(-by, 0), like.shape[dim] - abs(by)):
        return None
    return n.args[0]


def _moved_by_pad(n: Node, made: Makers) -> Node | None:
    """Rows left out at one end, zeros laid at the other."""
    found = _pad(n)
    if found is None or min(found[1:]) != 0 or not isinstance(n.args[0], Ref):
        return None
    dim, lo, hi = found
    x = _part(made, n.args[0], dim, lo - hi, n.type)
    return None if x is None else _moved(n, x, dim, lo - hi)


def _difference(n: Node, made: Makers) -> list[Node]:
    """All but the first less all but the last."""
    args, _ = bind(n)
    if args["n"] != 1 or args["prepend"] is not None or args["append"] is not None:
        return [n]
    x, dim = args["self"], args["dim"] % len(n.type.shape)
    t = replace(n.type, requires_grad=_type(made, x).requires_grad)
    later, earlier = (
        Node(f"{n.name}.{name}", aten.slice.Tensor, (x, dim, *ends), {}, (t,), n.source)
        for name, ends in (("later", (1, 2**63 - 1)), ("earlier", (0, -1)))
    )
    both = (Ref(later.name), Ref(earlier.name))
    return [later, earlier, replace(n, op=aten.sub.Tensor, args=both, kwargs={})]


def _moved_by_cat(n: Node, made: Makers) -> Node | None:
    parts = n.args[0]
    if len(parts) != 2:
        return None
    dim = (n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", 0)) % len(n.type.shape)
    for k, sign in ((0, 1), (1, -1)):
        zeros, rest = made[parts[k].name], parts[1 - k]
        if zeros.op not in ZEROS or len(zeros.type.shape) != len(n.type.shape):
            continue
        count = zeros.type.shape[dim]
        x = _part(made, rest, dim, sign * count, n.type) if isinstance(count, int) else None
        if x is not None:
            return _moved(n, x, dim, sign * count)
    return None


# on a rank


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
    """One op on the tiles of a rank's part (see `tspc.along`)."""

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
        rest = [d for d in self.args["dims"] if d % x.dim() != self.dim]
        turned = self.parts(self.extend(x, 0, 0, "mirror")).flip(self.dim + 1).reshape(x.shape)
        return turned.flip(rest) if rest else turned

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
