"""Ops along the sequence, however they are written, in one form.

What keeps the length of a dim: a convolution with its pads and the slice of its result is
`sequence_conv`, rows moved by a slice and zeros are a pad by (n, -n).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from tspc.ir.binding import bind
from tspc.ir.builder import Builder
from tspc.ir.kinds import PADS
from tspc.ir.program import Node, Ref, Size, Type
from tspc.ops.sequence import SEQUENCE_CONV

aten, tspc = torch.ops.aten, torch.ops.tspc
CONVS = (aten.conv1d.default, aten.conv1d.padding)
ZEROS = (aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default)
Nodes = Mapping[str, Node]


def canonical(b: Builder, n: Node) -> Node:
    """The node, or what stands for it under its name."""
    nodes = b.by_name
    if n.op in CONVS or n.op == aten.slice.Tensor:
        conv = _convolution(n, nodes) or n
        return _product(b, conv) if conv.op == SEQUENCE_CONV else conv
    if n.op in PADS and n.type.is_float:  # masks are read as they are written
        return _moved_by_pad(n, nodes) or n
    if n.op == aten.cat.default and n.type.is_float:
        return _moved_by_cat(n, nodes) or n
    if n.op == aten.diff.default and n.type.is_float:
        return _difference(b, n)
    return n


def _type(nodes: Nodes, r: Ref) -> Type:
    t = nodes[r.name].types[r.item or 0]
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


def _convolution(n: Node, nodes: Nodes) -> Node | None:
    """A convolution along the last dim, with zeros laid in front and behind, of which as many rows
    are kept as there were."""
    conv, skipped = n, 0
    if n.op == aten.slice.Tensor:
        conv = nodes[n.args[0].name]
        kept = _range(n, 2) if conv.op in CONVS and len(n.type.shape) == 3 else None
        if kept is None:
            return None
        skipped = kept[0]
    args, _ = bind(conv)
    x, weight = args["input"], args["weight"]
    size = _type(nodes, weight).shape[2]
    stride, dilation = _number(args["stride"]), _number(args["dilation"])
    if len(conv.type.shape) != 3 or stride != 1 or dilation is None or not isinstance(size, int):
        return None
    reach, padding = dilation * (size - 1), args["padding"]
    padding = {"same": reach // 2, "valid": 0}.get(padding) if isinstance(padding, str) else padding
    left = _number(padding)
    if left is None:
        return None
    source = nodes[x.name]
    laid = _laid(source) if source.op in PADS else None
    if laid is not None:
        x, left = source.args[0], left + laid[0]
    left -= skipped
    if n.type.shape[2] != _type(nodes, x).shape[2] or not 0 <= left <= reach:
        return None
    groups = 0 if _each_alone(nodes, x, weight) else args["groups"]
    args = (x, weight, args["bias"], left, dilation, groups)
    return replace(n, op=SEQUENCE_CONV, args=args, kwargs={})


def _product(b: Builder, n: Node) -> Node:
    """A convolution that reads one row is a product of each row with the weight."""
    x, weight, bias, *_, groups = n.args
    w = b.type(weight)
    if w.shape[2] != 1 or groups != 1:
        return n
    (batch, o, s), c, dtype = n.type.shape, w.shape[1], n.type.dtype
    rows = b.of(aten.transpose.int, (x, 1, 2), (batch, s, c), b.type(x).dtype, "rows")
    flat = b.of(aten.view.default, (weight, (o, c)), (o, c), w.dtype, "weight")
    operands = (rows, flat, *([] if bias is None else [bias]))
    linear = b.of(aten.linear.default, operands, (batch, s, o), dtype, "linear")
    return replace(n, op=aten.transpose.int, args=(linear, 1, 2))


def _each_alone(nodes: Nodes, x: Ref, weight: Ref) -> bool:
    """One channel out for one channel in, of which there are more."""
    channels = _type(nodes, x).shape[1]
    return channels != 1 and _type(nodes, weight).shape[:2] == (channels, 1)


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
    pad = _pad(n)
    if pad is None or pad[0] != 2 or len(n.type.shape) != 3 or min(pad[1:]) < 0:
        return None
    return pad[1:]


def _moved(n: Node, x: Ref, dim: int, by: int) -> Node:
    pads = (0, 0) * (len(n.type.shape) - 1 - dim) + (by, -by)
    return replace(n, op=aten.pad.default, args=(x, pads), kwargs={})


def _part(nodes: Nodes, r: Ref, dim: int, by: int, like: Type) -> Ref | None:
    """What a value is all of the rows of, but for the last `by`, or the first -by."""
    n = nodes[r.name]
    if n.op != aten.slice.Tensor or len(n.type.shape) <= dim:
        return None
    source = _type(nodes, n.args[0])
    kept = _range(n, dim)
    same = source.shape == like.shape and source.dtype == like.dtype
    if not same or kept != (max(-by, 0), like.shape[dim] - abs(by)):
        return None
    return n.args[0]


def _moved_by_pad(n: Node, nodes: Nodes) -> Node | None:
    """Rows left out at one end, zeros laid at the other."""
    pad = _pad(n)
    if pad is None or min(pad[1:]) != 0 or not isinstance(n.args[0], Ref):
        return None
    dim, lo, hi = pad
    x = _part(nodes, n.args[0], dim, lo - hi, n.type)
    return None if x is None else _moved(n, x, dim, lo - hi)


def _difference(b: Builder, n: Node) -> Node:
    """All but the first less all but the last."""
    args, _ = bind(n)
    if args["n"] != 1 or args["prepend"] is not None or args["append"] is not None:
        return n
    x, dim = args["self"], args["dim"] % len(n.type.shape)
    kind = n.type.shape, n.type.dtype
    both = (
        b.of(aten.slice.Tensor, (x, dim, *ends), *kind, name)
        for name, ends in (("later", (1, 2**63 - 1)), ("earlier", (0, -1)))
    )
    return replace(n, op=aten.sub.Tensor, args=tuple(both), kwargs={})


def _moved_by_cat(n: Node, nodes: Nodes) -> Node | None:
    parts = n.args[0]
    if len(parts) != 2:
        return None
    dim = (n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", 0)) % len(n.type.shape)
    for k, sign in ((0, 1), (1, -1)):
        zeros, source = nodes[parts[k].name], parts[1 - k]
        if zeros.op not in ZEROS or len(zeros.type.shape) != len(n.type.shape):
            continue
        count = zeros.type.shape[dim]
        x = _part(nodes, source, dim, sign * count, n.type) if isinstance(count, int) else None
        if x is not None:
            return _moved(n, x, dim, sign * count)
    return None
