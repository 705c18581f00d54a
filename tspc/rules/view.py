"""Rules of ops that move elements: views, slices, concatenation, indexing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tspc.base.context import Keywords
from tspc.factors.factor import Dim, Dims, const, divide
from tspc.factors.notation import Op, fallback
from tspc.factors.registry import computed, rule
from tspc.ir.program import Size
from tspc.rules.norm import at

aten = torch.ops.aten

rule(aten.numpy_T.default, "a b -> b a")
rule(aten.t.default, "a b -> b a")
rule(aten.view_as_complex.default, "... c -> ...", whole="c")
rule(aten.view_as_real.default, "... -> ... c", whole="c")


@computed(
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
)
def view(op: Op) -> Sequence[Dims]:
    shape = op.shape()
    out = op.F.regroup(op.ins[0], shape)
    if out is None:
        for d in op.ins[0]:
            op.event("whole", d, 0, "view does not divide")
        return [op.fresh("view does not divide")]
    return [out]


@computed(aten.transpose.int)
def transpose(op: Op) -> Sequence[Dims]:
    d = list(op.ins[0])
    i, j = at(op, op.args["dim0"]), at(op, op.args["dim1"])
    d[i], d[j] = d[j], d[i]
    return [d]


@computed(aten.permute.default)
def permute(op: Op) -> Sequence[Dims]:
    return [[op.ins[0][at(op, k)] for k in op.args["dims"]]]


@computed(aten.expand.default, aten.broadcast_to.default)
def expand(op: Op) -> Sequence[Dims]:
    shape = op.shape()
    n = len(shape) - len(op.ins[0])
    old: list[Dim] = [()] * n + list(op.ins[0])
    return [[d if d or s == 1 else op.F.dim(s, op.node.name) for d, s in zip(old, shape)]]


@computed(aten.repeat.default)
def repeat(op: Op) -> Sequence[Dims]:
    n = len(op.args["repeats"]) - len(op.ins[0])
    old: list[Dim] = [()] * n + list(op.ins[0])
    return [[op.new(k, "copies") + d for k, d in zip(op.args["repeats"], old)]]


@computed(aten.repeat_interleave.self_int)
def repeat_interleave(op: Op) -> Sequence[Dims]:
    if op.args["dim"] is None:
        return fallback(op, "repeats a flat tensor")
    k = at(op, op.args["dim"])
    d = list(op.ins[0])
    d[k] = d[k] + op.new(op.args["repeats"], "copies")
    return [d]


@computed(
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.tensor_split.sections,
)
def split(op: Op) -> Sequence[Dims]:
    k = at(op, op.args["dim"])
    sizes = [op.shape(i)[k] for i in range(len(op.node.types))]
    segs = op.F.cut(op.ins[0][k], sizes)
    if segs is None:
        op.event("whole", op.ins[0][k], 0, "split inside of a factor")
        segs = [op.new(n, "split inside of a factor") for n in sizes]
    return [[*op.ins[0][:k], s, *op.ins[0][k + 1 :]] for s in segs]


def bounds(args: Keywords, n: Size) -> tuple[Size, Size, int]:
    """(start, end, step) of a slice of n elements, counted from the front."""
    lo, hi = args.get("start") or 0, args.get("end")
    hi = n if hi is None or (const(hi) and (hi > n if const(n) else hi > 2**40)) else hi

    def front(v: Size) -> Size:
        return n + v if const(v) and v < 0 else v

    return front(lo), front(hi), args.get("step", 1)


@computed(aten.slice.Tensor)
def slice_(op: Op) -> Sequence[Dims]:
    """Whole dim: nothing.

    A step, or slices that together tile the dim: refine. Else the dim is needed whole.
    """
    k = at(op, op.args["dim"])
    d = op.ins[0][k]
    n = op.F.size(d)
    lo, hi, step = bounds(op.args, n)
    if (lo, step) == (0, 1) and (hi == n or op.shape()[k] == n):
        return [list(op.ins[0])]
    part = _segment(op, k, lo, hi) if step == 1 else None
    if step != 1 and divide(n, step) is not None and const(lo) and lo < step and hi == n:
        parts = op.F.regroup([d], [divide(n, step) or 0, step])
        if parts:
            op.event("whole", parts[1], 0, "strided slice")
            part = parts[0]
    if part is None:
        part = op.F.dim(op.shape()[k], op.node.name)
        role = "trim" if step == 1 and part and len(op.F.expand(d)) == 1 else "whole"
        op.event(role, d, 0, "slice")
        op.event(role, part, None, "slice")
        for g in part:
            g.part_of = op.F.expand(d)[0]  # a range of d: local ranges of any layout, no exchange
    return [[part if j == k else x for j, x in enumerate(op.ins[0])]]


def _segment(op: Op, k: int, lo: Size, hi: Size) -> Dim | None:
    """The slice [lo, hi) of a dim, where it and its siblings tile it or bounds lie on existing
    segments."""
    d = op.ins[0][k]
    n = op.F.size(d)
    segments = {(lo, hi)} | {
        bounds(a, n)[:2]
        for a in op.siblings
        if a["dim"] % len(op.ins[0]) == k and a.get("step", 1) == 1
    }
    cuts: list[Size] = [0]
    while nxt := [h for l, h in segments if l == cuts[-1] and h != l and h not in cuts]:
        cuts.append(nxt[0])
    tiles = cuts[-1] == n and all(
        l in cuts and cuts.index(h) == cuts.index(l) + 1
        for l, h in segments
        if (l, h) != (0, n) and h in cuts
    )
    f = op.F.expand(d)[:1]
    if not tiles and f and f[0].cat:
        bs: list[Size] = [0]
        minor = op.F.size(op.F.expand(d)[1:])
        for s in op.F.flat(f[0].cat):
            bs.append(bs[-1] + op.F.size(s) * minor)
        if lo in bs and hi in bs:
            cuts, tiles = sorted({0, lo, hi, n}, key=bs.index), True
    if not tiles or lo not in cuts or hi not in cuts:
        return None
    segs = op.F.cut(d, [b - a for a, b in zip(cuts, cuts[1:])])
    return op.F.concat(segs[cuts.index(lo) : cuts.index(hi)], op.node.name) if segs else None


@computed(aten.slice_scatter.default)
def slice_scatter(op: Op) -> Sequence[Dims]:
    k, F = at(op, op.args["dim"]), op.F
    n = op.shape()[k]
    lo, hi, step = bounds(op.args, n)
    x, src = op.ins[0], op.ins[1]
    sizes: list[Size] = [m for m in (lo, hi - lo, n - hi) if m]
    if step != 1:
        return fallback(op, "strided slice")
    fresh = [op.new(m, "slice") or (F.new(1),) for m in sizes] if op.weak[0] else None
    segs = fresh or F.cut(x[k], sizes)
    if segs is None:
        return fallback(op, "slice inside of a factor")
    at_src = 1 if lo else 0
    joined = [op.join(segs[at_src] if j == k else x[j], d, 0, 1) for j, d in enumerate(src)]
    segs[at_src] = joined[k]
    out = [F.concat(segs, op.node.name) if j == k else d for j, d in enumerate(joined)]
    op.ins = [out if op.weak[0] else x, joined if op.weak[1] else src]
    return [out]


@computed(aten.select.int, aten.unbind.int)
def select(op: Op) -> Sequence[Dims]:
    k = at(op, op.args["dim"])
    op.event("select", op.ins[0][k], 0)
    return [[d for i, d in enumerate(op.ins[0]) if i != k] for _ in op.node.types]


@computed(aten.cat.default, aten.stack.default)
def cat(op: Op) -> Sequence[Dims]:
    n = len(op.shape())
    k = op.args.get("dim", 0) % n
    if "stack" in str(op.node.op):
        ins: list[Dims] = [[*d[:k], (), *d[k:]] for d in op.ins]
    else:
        ins = [
            d for d in op.ins if not (len(d) == 1 and op.F.size(d[0]) == 0)
        ]  # torch skips empty 1-D operands
    out = []
    for j in range(n):
        if j == k:
            ranges = [(i, d[k]) for i, d in enumerate(ins) if trimmed(op, d[k])]
            for i, d in ranges:
                op.event("whole", d, i, "joined")
            out.append(
                op.new(op.shape()[k], "joined")
                if ranges or all(not d[k] for d in ins)
                else op.F.concat([d[k] or (op.F.new(1, op.node.name),) for d in ins], op.node.name)
            )
            continue
        d = ins[0][j]
        for i, other in enumerate(ins[1:], 1):
            d = op.join(d, other[j], 0, i)
        out.append(d)
    return [out]


def trimmed(op: Op, dim: Dim) -> bool:
    """The dim is a range of another: what it is made part of is not made of segments."""
    return any(f.part_of for f in op.F.expand(dim))


@computed(aten.pad.default, aten.constant_pad_nd.default)
def pad(op: Op) -> Sequence[Dims]:
    """A constant is laid at the ends of a dim; zeros at one end and as many rows left out at the
    other move it; other pads, and those that cut, need it whole."""
    out, p = list(op.ins[0]), op.args["pad"]
    fixed = all(map(const, p))
    for j in range(len(p) // 2):
        k, (lo, hi) = len(out) - 1 - j, p[2 * j : 2 * j + 2]
        if (lo, hi) == (0, 0):
            continue
        laid = op.args.get("mode", "constant") == "constant" and not trimmed(op, out[k])
        if laid and fixed and lo == -hi and not op.args.get("value"):
            op.event("halo", out[k], 0)
            continue
        if not laid or not all(const(m) and m >= 0 for m in (lo, hi)):
            op.event("whole", out[k], 0, "pad")
            out[k] = op.new(op.shape()[k], "pad")
            continue
        ends: list[list[Dim]] = [
            [op.new(m, "pad") or (op.F.new(1),)] if m else [] for m in (lo, hi)
        ]
        out[k] = op.F.concat([*ends[0], out[k] or (op.F.new(1),), *ends[1]], op.node.name)
    return [out]


@computed(aten.index.Tensor)
def index(op: Op) -> Sequence[Dims]:
    """Rule of x[i, j, :]: indexed dims are selected; the broadcast dims of the indices take their
    place."""
    pos = [k for k, r in enumerate(op.args["indices"]) if r is not None]
    indices = [i for i in range(1, len(op.ins)) if op.refs[i] is not None]
    got: list[Dim] = [()] * max(len(op.ins[i]) for i in indices)
    for i in sorted(indices, key=lambda i: op.weak[i]):
        start = len(got) - len(op.ins[i])
        for j, d in enumerate(op.ins[i], start):
            got[j] = op.join(d, got[j], i)
    for i in indices:
        start = len(got) - len(op.ins[i])
        op.ins[i] = [got[j] if d else d for j, d in enumerate(op.ins[i], start)]
    for k in pos:
        op.event("select", op.ins[0][k], 0)
    adjacent = pos == list(range(pos[0], pos[-1] + 1))
    others = [d for k, d in enumerate(op.ins[0]) if k not in pos]
    return [others[: pos[0]] + got + others[pos[0] :] if adjacent else got + others]


@computed(aten.gather.default)
def gather(op: Op) -> Sequence[Dims]:
    """The index and the operand run in step along the other dims, over a range of the longer."""
    k = at(op, op.args["dim"])
    x, out = op.ins
    op.event("select", x[k], 0)
    out = list(out)
    for j, d in enumerate(x):
        if j == k:
            continue
        if op.F.size(d) == op.F.size(out[j]):
            out[j] = op.join(out[j], d, 1, 0)
        else:
            op.event("whole", d, 0, "gather from a range")
            op.event("whole", out[j], 1, "gather from a range")
    op.ins[1] = out
    return [out]


@computed(aten.diff.default)
def diff(op: Op) -> Sequence[Dims]:
    if len([r for r in op.refs if r is not None]) > 1:
        return fallback(op, "diff with a prefix")
    k = at(op, op.args["dim"])
    op.event("whole", op.ins[0][k], 0, "diff")
    out = list(op.ins[0])
    out[k] = op.new(op.shape()[k], "diff")
    return [out]
