"""Rules of ops that move elements: views, slices, concatenation, indexing."""

from __future__ import annotations

import torch

from tspc.factor import const, divide
from tspc.rule import Op, computed, fallback, rule
from tspc.rules.norm import at

aten = torch.ops.aten

rule(aten.numpy_T.default, "a b -> b a")
rule(aten.t.default, "a b -> b a")
rule(aten.view_as_complex.default, "... c -> ...", whole="c")
rule(aten.view_as_real.default, "... -> ... c")


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
def view(op: Op) -> list:
    shape = op.node.types[0].shape
    out = op.F.regroup(op.ins[0], shape)
    if out is None:
        for d in op.ins[0]:
            op.event("whole", d, 0, "view does not divide")
        op.F.mismatch.append((op.node.name, " ".join(map(op.F.show, op.ins[0])), str(shape)))
        return [op.fresh()]
    return [out]


@computed(aten.transpose.int)
def transpose(op: Op) -> list:
    d = list(op.ins[0])
    i, j = at(op, op.args["dim0"]), at(op, op.args["dim1"])
    d[i], d[j] = d[j], d[i]
    return [d]


@computed(aten.permute.default)
def permute(op: Op) -> list:
    return [[op.ins[0][at(op, k)] for k in op.args["dims"]]]


@computed(aten.expand.default, aten.broadcast_to.default)
def expand(op: Op) -> list:
    shape = op.node.types[0].shape
    n = len(shape) - len(op.ins[0])
    old = [()] * n + list(op.ins[0])
    return [[d if d or s == 1 else op.F.dim(s, op.node.name) for d, s in zip(old, shape)]]


@computed(aten.repeat.default)
def repeat(op: Op) -> list:
    n = len(op.args["repeats"]) - len(op.ins[0])
    return [
        [
            op.F.dim(k, op.node.name) + d
            for k, d in zip(op.args["repeats"], [()] * n + list(op.ins[0]))
        ]
    ]


@computed(aten.repeat_interleave.self_int)
def repeat_interleave(op: Op) -> list:
    k = at(op, op.args["dim"])
    d = list(op.ins[0])
    d[k] = d[k] + op.F.dim(op.args["repeats"], op.node.name)
    return [d]


@computed(
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.tensor_split.sections,
)
def split(op: Op) -> list:
    k = at(op, op.args["dim"])
    segs = op.F.cut(op.ins[0][k], [t.shape[k] for t in op.node.types])
    if segs is None:
        op.event("whole", op.ins[0][k], 0, "split inside of a factor")
        segs = [op.F.dim(t.shape[k], op.node.name) for t in op.node.types]
    return [[*op.ins[0][:k], s, *op.ins[0][k + 1 :]] for s in segs]


@computed(aten.slice.Tensor)
def slice_(op: Op) -> list:
    """Whole dim: nothing.

    A step, or slices that together tile the dim: refine. Else the dim is needed whole.
    """

    def bounds(args, n):
        lo, hi = args.get("start") or 0, args.get("end")
        hi = n if hi is None or (const(hi) and (hi > n if const(n) else hi > 2**40)) else hi

        def fix(v):
            return n + v if const(v) and v < 0 else v

        return fix(lo), fix(hi), args.get("step", 1)

    k = at(op, op.args["dim"])
    d = op.ins[0][k]
    n = op.F.size(d)
    lo, hi, step = bounds(op.args, n)
    out = list(op.ins[0])
    if (lo, step) == (0, 1) and (hi == n or op.node.types[0].shape[k] == n):
        return [out]
    if step != 1 and divide(n, step) is not None and const(lo) and lo < step and hi == n:
        parts = op.F.regroup([d], [divide(n, step), step])
        if parts:
            op.event("whole", parts[1], 0, "strided slice")
            out[k] = parts[0]
            return [out]
    if step == 1:
        mine = {(lo, hi)} | {
            bounds(a, n)[:2]
            for a in op.siblings
            if a["dim"] % len(op.ins[0]) == k and a.get("step", 1) == 1
        }
        cuts = [0]
        while nxt := [h for l, h in mine if l == cuts[-1] and h != l and h not in cuts]:
            cuts.append(nxt[0])
        tiles = cuts[-1] == n and all(
            l in cuts and cuts.index(h) == cuts.index(l) + 1
            for l, h in mine
            if (l, h) != (0, n) and h in cuts
        )
        f = op.F.expand(d)[:1]
        if not tiles and f and f[0].cat:  # bounds may lie on existing segments
            bs = [0]
            minor = op.F.size(op.F.expand(d)[1:])
            for s in op.F.flat(f[0].cat):
                bs.append(bs[-1] + op.F.size(s) * minor)
            if lo in bs and hi in bs:
                cuts, tiles = sorted({0, lo, hi, n}, key=bs.index), True
        if tiles and (lo in cuts and hi in cuts):
            segs = op.F.cut(d, [b - a for a, b in zip(cuts, cuts[1:])])
            if segs:
                out[k] = op.F.concat(segs[cuts.index(lo) : cuts.index(hi)], op.node.name)
                return [out]
    out[k] = op.F.dim(op.node.types[0].shape[k], op.node.name)
    op.event(
        "trim" if step == 1 and out[k] and len(op.F.expand(d)) == 1 else "whole", d, 0, "slice"
    )
    for g in out[k]:
        g.part_of = op.F.expand(d)[0]  # a range of d: local ranges of any layout, no exchange
    return [out]


@computed(aten.slice_scatter.default)
def slice_scatter(op: Op) -> list:
    k, F = at(op, op.args["dim"]), op.F
    n = op.node.types[0].shape[k]
    lo = op.args["start"] or 0
    hi = op.args["end"]
    hi = n if hi is None or hi > n else hi
    sizes = [lo, hi - lo, n - hi]
    x, src = op.ins[0], op.ins[1]
    segs = (
        [F.dim(m, op.node.name) or (F.new(1),) for m in sizes if m]
        if op.weak[0]
        else F.cut(x[k], [m for m in sizes if m])
    )
    if segs is None:
        return fallback(op)
    if op.weak[0]:
        op.ins[0] = [F.concat(list(segs), op.node.name) if j == k else d for j, d in enumerate(src)]
    segs[1 if lo else 0] = src[k]
    return [
        [
            F.concat(segs, op.node.name) if j == k else op.join(x[j], d, 0, 1)
            for j, d in enumerate(src)
        ]
    ]


@computed(aten.select.int, aten.unbind.int)
def select(op: Op) -> list:
    k = at(op, op.args["dim"])
    op.event("select", op.ins[0][k], 0)
    return [[d for i, d in enumerate(op.ins[0]) if i != k] for _ in op.node.types]


@computed(aten.cat.default, aten.stack.default)
def cat(op: Op) -> list:
    n = len(op.node.types[0].shape)
    k = op.args.get("dim", 0) % n
    if "stack" in str(op.node.op):
        ins = [[*d[:k], (), *d[k:]] for d in op.ins]
    else:
        ins = [
            list(d) for d in op.ins if not (len(d) == 1 and op.F.size(d[0]) == 0)
        ]  # torch skips empty 1-D operands
    out = []
    for j in range(n):
        if j == k:
            out.append(
                op.F.dim(op.node.types[0].shape[k], op.node.name)
                if all(not d[k] for d in ins)
                else op.F.concat([d[k] or (op.F.new(1, op.node.name),) for d in ins], op.node.name)
            )
            continue
        d = ins[0][j]
        for i, other in enumerate(ins[1:], 1):
            d = op.join(d, other[j], 0, i)
        out.append(d)
    return [out]


@computed(aten.pad.default, aten.constant_pad_nd.default)
def pad(op: Op) -> list:
    out, p, F = list(op.ins[0]), op.args["pad"], op.F
    for j in range(len(p) // 2):
        k = len(out) - 1 - j
        lo, hi = p[2 * j], p[2 * j + 1]
        if (lo, hi) != (0, 0):
            out[k] = F.concat(
                [
                    (F.new(n, op.node.name),) if i != 1 else out[k]
                    for i, n in enumerate((lo, 1, hi))
                    if n
                ],
                op.node.name,
            )
    return [out]


@computed(aten.index.Tensor)
def index(op: Op) -> list:
    """X[i, j, :]: indexed dims are selected; the broadcast dims of the indices take their
    place."""
    idx = list(op.args["indices"])
    x = op.ins[0]
    pos = [k for k, r in enumerate(idx) if r is not None]
    ops_ = [d for d in op.ins[1:] if d is not None]
    m = max(len(d) for d in ops_)
    got = []
    for j in range(m):
        d = ()
        for i, o in enumerate(ops_, 1):
            if m - j <= len(o):
                d = op.join(d, o[len(o) - (m - j)], i, i)
        got.append(d)
    for k in pos:
        op.event("select", x[k], 0)
    adjacent = pos == list(range(pos[0], pos[-1] + 1))
    rest = [d for k, d in enumerate(x) if k not in pos]
    return [rest[: pos[0]] + got + rest[pos[0] :] if adjacent else got + rest]


@computed(aten.gather.default)
def gather(op: Op) -> list:
    k = at(op, op.args["dim"])
    op.event("select", op.ins[0][k], 0)
    return [
        [
            d if j == k else op.join(d, op.ins[0][j], 1, 0) if op.ins[0][j] else d
            for j, d in enumerate(op.ins[1])
        ]
    ]


@computed(aten.diff.default)
def diff(op: Op) -> list:
    k = at(op, op.args["dim"])
    op.event("whole", op.ins[0][k], 0, "diff")
    out = list(op.ins[0])
    if op.node.types[0].shape[k] != op.F.size(out[k]):
        out[k] = op.F.dim(op.node.types[0].shape[k], op.node.name)
    return [out]
