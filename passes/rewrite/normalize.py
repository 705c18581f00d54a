"""Bring a program to a normal form: constant indices are slices, identities go, the cross-entropy
is spelled out.

In: a captured program. Out: an equal one for which every later pass has a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace

import torch

from tspc.base.context import Arguments
from tspc.ir.builder import Builder
from tspc.ir.program import (
    CASTS,
    CONSTANT,
    PARAM,
    PLACEHOLDERS,
    SDPA,
    SHAPE_ONLY,
    Node,
    Program,
    Ref,
)
from tspc.ops.attention import ATTENTION, bound, spelled
from tspc.passes.rewrite.entropy import cross_entropy
from tspc.passes.rewrite.sequence_ops import canonical
from tspc.seams.tensors import OpOverload

aten = torch.ops.aten
PASSED = (
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.clone.default,
)
CONVOLUTIONS = {
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
NARROW = (torch.bfloat16, torch.float16)
WIDENED = (aten.cross_entropy_loss.default, aten.logsumexp.default)


class _Builder(Builder):
    """casts: of parameters, not placed yet. cast: those that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[str, Node] = {}
        self.cast: dict[object, Ref] = {}

    def cast_here(self, r: Ref) -> Ref:
        """The use's own copy of a parameter's cast."""
        if r.name not in self.casts:
            return r
        name = f"{r.name}.{len(self.nodes)}" if r.name in self.by_name else r.name
        return self.add(replace(self.casts[r.name], name=name, recompute=self.node.recompute))


def normalize(program: Program, refused: Container[str] = ()) -> Program:
    """Every rewrite keeps the values bit for bit, but for the order of the cross-entropy's
    sums. refused: nodes that are left as they are."""
    b = _Builder()
    for n in program.nodes:
        n = n.map_refs(b.use)
        if n.op == SDPA:
            n = spelled(n, *bound(n))
        b.at(n)
        if n.name in refused:
            b.add(n.map_refs(b.cast_here))
            continue
        if n.op in CASTS and _cast(b, n):
            continue
        n = n.map_refs(b.cast_here)
        if n.op in WIDENED and b.type(n.args[0]).dtype in NARROW:
            n = _widened(b, n)
        if n.op == aten.cross_entropy_loss.default:
            b.instead(Ref(n.name), cross_entropy(b, n))
            continue
        if n.op in REWRITES:
            n = REWRITES[n.op](b, n)
        n = canonical(b, n)
        same = _identity(b, n)
        if same is not None:
            b.instead(Ref(n.name), same)
        else:
            b.add(n)
    return replace(program, nodes=tuple(b.nodes)).without_dead_nodes()


def _cast(b: _Builder, n: Node) -> bool:
    """A cast that is not needed here: to the same type, made before, or of a parameter (each use
    makes its own, which moves into what brings the parameter there)."""
    source = b.type(n.args[0])
    key = (n.args[0], n.types, n.recompute)
    if source.dtype == n.type.dtype and source.requires_grad == n.type.requires_grad:
        b.instead(Ref(n.name), n.args[0])
    elif n.args[0].name in b.by_name and b.by_name[n.args[0].name].op == PARAM:
        b.casts[n.name] = n
    elif key in b.cast:
        b.instead(Ref(n.name), b.cast[key])
    else:
        b.cast[key] = Ref(n.name)
        return False
    return True


def _widened(b: _Builder, n: Node) -> Node:
    """In fp32, as torch's kernels are inside; what the op is spelled out to would round midway."""

    x = n.args[0]
    dtypes = b.type(x).shape, torch.float32
    args = (b.of(aten.to.dtype, (x, torch.float32), *dtypes, "logits"), *n.args[1:])
    t = replace(n.type, dtype=torch.float32)
    wide = replace(n, name=f"{n.name}.wide", args=args, types=(t,))
    b.at(wide)
    result = cross_entropy(b, wide) if n.op == aten.cross_entropy_loss.default else b.add(wide)
    b.at(n)
    return replace(n, op=aten.to.dtype, args=(result, n.type.dtype), kwargs={})


def _identity(b: _Builder, n: Node) -> Ref | None:
    """The operand that the node equals."""
    if not n.is_call or not n.args or not isinstance(n.args[0], Ref):
        if n.op == aten.cat.default:
            return _one_part(b, n)
        return None
    source = b.type(n.args[0])
    if len(n.types) != 1 or n.types[0] is None or n.type.dtype != source.dtype:
        return None
    if n.op == aten.slice.Tensor:
        return n.args[0] if n.type.shape == source.shape and _step(n) == 1 else None
    if n.op in (aten.view.default, aten.reshape.default, aten.expand.default):
        return n.args[0] if n.type.shape == source.shape else None
    if n.op == aten.clone.default or n.op == aten.contiguous.default:
        return n.args[0]
    return None


def _step(n: Node) -> int:
    return n.args[4] if len(n.args) > 4 else n.kwargs.get("step", 1)


def _one_part(b: _Builder, n: Node) -> Ref | None:
    """A concatenation of which all but one operand are empty (a cache at its first call)."""
    parts = [r for r in n.args[0] if 0 not in b.type(r).shape]
    return parts[0] if len(parts) == 1 and b.type(parts[0]).dtype == n.type.dtype else None


def _copied(b: _Builder, n: Node) -> Node:
    """What is copied, in the type and shape of what it is copied into."""
    source = b.type(n.args[1])
    if source.dtype != n.type.dtype:
        t = replace(source, dtype=n.type.dtype, requires_grad=n.type.requires_grad)
        cast = b.emit(aten.to.dtype, n.args[1], t.dtype, types=(t,), suffix="cast")
        n = replace(n, args=(n.args[0], cast))
    return replace(n, op=aten.expand.default, args=(n.args[1], n.type.shape), kwargs={})


def _joined(b: _Builder, n: Node) -> Node:
    """Ranges that are written one after another and leave nothing of what they are written into:
    their concatenation."""
    names = ("self", "src", "dim", "start", "end", "step")
    parts: dict[int, tuple[int, Ref]] = {}
    node, dim, size = n, None, 0
    while node.op == aten.slice_scatter.default:
        defaults: Arguments = (None, None, 0, None, None, 1)
        arguments = dict(zip(names, defaults)) | dict(zip(names, node.args)) | node.kwargs
        dim = arguments["dim"] % len(n.type.shape) if dim is None else dim
        size, lo = n.type.shape[dim], arguments["start"] or 0
        hi = size if arguments["end"] is None else arguments["end"]
        numbers = all(isinstance(x, int) for x in (size, lo, hi))
        if (
            arguments["dim"] % len(n.type.shape) != dim
            or arguments["step"] != 1
            or not numbers
            or lo < 0
        ):
            return n
        if lo in parts or b.type(arguments["src"]).dtype != n.type.dtype:
            return n
        parts[lo] = min(hi, size), arguments["src"]
        node = next((m for m in b.nodes if m.name == arguments["self"].name), n)
        if node is n:
            return n
        at = 0
        while at in parts:
            at = parts[at][0]
        if at == size:
            pieces = tuple(x for _, (_, x) in sorted(parts.items()))
            whole = sum(hi - lo for lo, (hi, _) in parts.items()) == size
            return replace(n, op=aten.cat.default, args=(pieces, dim), kwargs={}) if whole else n
    return n


def _scaled(b: _Builder, n: Node) -> Node:
    """beta * bias + alpha * (x @ y), spelled out where a factor is not 1."""
    beta, alpha = n.kwargs.get("beta", 1), n.kwargs.get("alpha", 1)
    if (beta, alpha) == (1, 1):
        return n
    bias, *factors = n.args
    product = aten.mm.default if n.op == aten.addmm.default else aten.bmm.default
    terms = []
    for name, op, args, scale in (
        ("product", product, tuple(factors), alpha),
        ("bias", aten.mul.Scalar, (bias, beta), 1),
    ):
        t = n.type if name == "product" else b.type(bias)
        scaled = b.emit(op, *args, types=(t,), suffix=name)
        if scale != 1:
            scaled = b.emit(aten.mul.Scalar, scaled, scale, types=(t,), suffix="scaled")
        terms.append(scaled)
    return replace(n, op=aten.add.Tensor, args=tuple(terms), kwargs={})


def _dense(_: _Builder, n: Node) -> Node:
    """A lookup by position arguments; a gradient that is wanted sparse is given dense."""
    more = [n.kwargs.get(k, v) for k, v in (("padding_idx", -1), ("scale_grad_by_freq", False))]
    return replace(n, args=(*n.args[:4], *more[len(n.args) - 2 :]), kwargs={})


def _chosen(b: _Builder, n: Node) -> Node:
    """x[mask] = one value is a choice between the two."""
    x, where, value = n.args[:3]
    t = b.type(where[0]) if len(where) == 1 and where[0] is not None else None
    if t is None or t.dtype != torch.bool or b.type(value).shape or any(n.args[3:]) or n.kwargs:
        return n
    mask = where[0]
    while len(t.shape) < len(n.type.shape):
        mask = _unsqueezed(b, mask, len(t.shape), str(len(t.shape)))
        t = b.type(mask)
    return replace(n, op=aten.where.self, args=(mask, value, x))


def _padded(b: _Builder, n: Node) -> Node:
    """A convolution whose padding is a word, "valid" or "same", with the numbers that it means."""
    args = [*n.args, *(None, (1,), "valid", (1,), 1)[len(n.args) - 2 :]]
    sizes = b.type(args[1]).shape[2:]
    steps = args[5] * len(sizes) if len(args[5]) == 1 else args[5]
    around = [d * (k - 1) if args[4] == "same" else 0 for d, k in zip(steps, sizes)]
    if n.kwargs or any(x % 2 for x in around):
        return n
    args[4] = tuple(x // 2 for x in around)
    return replace(n, op=CONVOLUTIONS[n.op], args=tuple(args))


def _with_a_head(b: _Builder, n: Node) -> Node:
    """Attention without a dim of heads: with one head."""
    args = list(n.args)
    for k in range(min(len(args), 4)):
        if args[k] is not None and len(b.type(args[k]).shape) == 3:
            args[k] = _unsqueezed(b, args[k], 1, str(k))
    t = replace(n.type, shape=(n.type.shape[0], 1, *n.type.shape[1:]))
    headed = b.emit(n.op, *args, types=(t,), suffix="head", **n.kwargs)
    return replace(n, op=aten.squeeze.dim, args=(headed, 1), kwargs={})


def all_dims(b: Builder, mask: Ref, n: Node) -> Ref:
    """A mask of attention with dims of queries and keys, and if it has one of heads, with all that
    is before."""
    count = 0
    while (rank := len(b.type(mask).shape)) < 2 or 2 < rank < len(n.type.shape):
        mask = _unsqueezed(b, mask, 0, f"mask{count}")
        count += 1
    return mask


def _unsqueezed(b: Builder, x: Ref, dim: int, suffix: str) -> Ref:
    t = b.type(x)
    shape = (*t.shape[:dim], 1, *t.shape[dim:])
    t = replace(t, shape=shape)
    return b.emit(aten.unsqueeze.default, x, dim, types=(t,), suffix=suffix)


def _on_a_placeholder(b: _Builder, n: Node) -> Node:
    """A filled tensor takes only dtype and device of its operand: of a placeholder, then."""
    placeholders = [m for m in b.nodes if m.op in PLACEHOLDERS]
    kept = [m for m in placeholders if m.op != PARAM] or placeholders
    if not kept:
        return n
    args = (Ref(kept[0].name), *n.args[1:])
    return replace(n, args=args, kwargs={**n.kwargs, "dtype": n.type.dtype})


def _constant_index(b: _Builder, n: Node) -> Node:
    """x[..., [i], ...] with one constant index of one element is a slice."""
    indices = n.args[1]
    at = [k for k, r in enumerate(indices) if r is not None]
    if len(at) != 1:
        return n
    node = next(m for m in b.nodes if m.name == indices[at[0]].name)
    while node.op in PASSED:
        first = node.args[0].name
        node = next(m for m in b.nodes if m.name == first)
    if node.op != CONSTANT or node.type.shape != (1,):
        return n
    start = node.kwargs["value"][0]
    end = start + 1 if start != -1 else 2**63 - 1
    return replace(n, op=aten.slice.Tensor, args=(n.args[0], at[0], start, end), kwargs={})


def _attended(b: _Builder, n: Node) -> Node:
    """Attention with a dim of heads and a mask of all dims."""
    if len(n.type.shape) == 3:
        return _with_a_head(b, n)
    if n.argument(3) is not None:
        n = replace(n, args=(*n.args[:3], all_dims(b, n.args[3], n), *n.args[4:]))
    return n


REWRITES: dict[OpOverload, Callable[[_Builder, Node], Node]] = {
    aten.embedding.default: _dense,
    aten.index_put.default: _chosen,
    aten.copy.default: _copied,
    aten.slice_scatter.default: _joined,
    aten.addmm.default: _scaled,
    aten.baddbmm.default: _scaled,
    ATTENTION: _attended,
    aten.index.Tensor: _constant_index,
    **dict.fromkeys(CONVOLUTIONS, _padded),
    **dict.fromkeys(SHAPE_ONLY, _on_a_placeholder),
}
