"""Find attention that is written out as products and a softmax, and make it one op.

In: a normalized program. Out: the same where softmax(f(scale * q kᵀ) + mask) v, of which nothing
else reads what is between, is one op. f: pointwise ops with constants, as a soft cap. The mask is
what is added, or filled in. Rows without a key stay what the model makes of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tspc.base.context import Keywords
from tspc.ir.program import CASTS, Node, Program, Ref, Size, Type
from tspc.ir.spec import AttentionSpec, Operands
from tspc.masks.index import negate
from tspc.masks.score import Step, composed
from tspc.ops.attention import ATTENTION
from tspc.passes.rewrite.masks import ABSORBS, Known, as_known, expressions
from tspc.passes.rewrite.reading import Reading
from tspc.seams.tensors import OpOverload

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
VIEWS = (aten.view.default, aten.reshape.default)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)


@dataclass
class _Scores:
    """score(scale * q kᵀ) + terms; q [*lead, queries, d], k [*lead, keys, d]."""

    q: Ref
    k: Ref
    scale: float
    score: str = ""
    terms: list[Ref] = field(default_factory=list)


def find_attention(program: Program, refused: Container[str] = ()) -> Program:
    """Every attention that is spelled out becomes the op, unless its last product is refused."""
    if not any(n.op in SOFTMAX for n in program.nodes):
        return program
    finder = _Finder(program, refused)
    for n in program.nodes:
        finder.nodes += (n.name not in refused and finder.replaced(n)) or [n]
    return replace(program, nodes=tuple(finder.nodes)).without_dead_nodes()


class _Finder(Reading):
    def __init__(self, program: Program, refused: Container[str]):
        super().__init__(program)
        self.program, self.refused = program, refused
        self.replicated = set(program.replicated)
        self.nodes: list[Node] = []
        self.env: dict[Ref, Any] = {}  # index expressions, made where they are asked for
        self.types: dict[Ref, Type] = {}

    def replaced(self, n: Node) -> list[Node] | None:
        """The nodes instead of a product of probabilities and values."""
        self.start(n)
        product = self._product(n)
        if product is None:
            return None
        weights, values, to_out = product
        softmax = self._softmax(weights)
        if softmax is None:
            return None
        before, sinks, dropout, lead = softmax
        scores = self._scores(before)
        if scores is None or len(lead) not in (1, 2):
            return None
        heads = len(lead) == 2
        lead = lead if heads else (*lead, 1)
        q, k, v = (self._led(x, lead) for x in (scores.q, scores.k, values))
        kinds = {self._type(x).dtype for x in (q, k, v)}
        if len(kinds) != 1:
            return None
        mask = self._mask(scores.terms, self._type(q).dtype, 0 if heads else 1)
        shape = (*lead, self._type(q).shape[-2], self._type(v).shape[-1])
        fill = -math.inf if sinks is None and (mask is not None or scores.score) else 0.0
        spec = AttentionSpec(scale=scores.scale, dropout=dropout, fill=fill, score=scores.score)
        args = Operands(q, k, v, mask, sinks=sinks).args
        out = self._emit(ATTENTION, args, shape, kinds.pop(), spec.kwargs)
        out = to_out(self._led(out, self._type(values).shape[:-2]))
        last = self.b.nodes[-1]
        if Ref(last.name) != out or last.types[0] is None or last.type.shape != n.type.shape:
            return None
        new = [*self.b.nodes[:-1], replace(last, name=n.name, types=n.types)]
        self.by_name.update((m.name, m) for m in new)
        return new

    def _with_sinks(self, r: Ref) -> tuple[Ref, Ref] | None:
        """(scores, sinks [heads]) of scores beside a column that is one number per head; less
        their greatest or not."""
        node = self._inner(r)
        if node is not None and node.op == aten.sub.Tensor and not node.kwargs:
            x, m = node.args
            top = self._inner(replace(m, item=None)) if isinstance(m, Ref) else None
            of = (top.op, *top.args) if top is not None and m.item in (None, 0) else ()
            greatest = ((aten.max.dim, x, -1, True), (aten.amax.default, x, (-1,), True))
            node = self.by_name[x.name] if of in greatest and self.users[x.name] == 2 else None
        if node is None or node.op != aten.cat.default or len(node.args[0]) != 2:
            return None
        rank = len(node.type.shape)
        if rank != 4 or node.argument(1, 0) % rank != rank - 1:
            return None
        scores, column = node.args[0]
        sinks = self._per_head(column, node.type.shape[1])
        return None if sinks is None else (scores, sinks)

    def _per_head(self, x: Ref, heads: Size) -> Ref | None:
        """The vector [heads] that a column [b, heads, q, 1] is made of."""
        while self.by_name[x.name].op in (aten.expand.default, aten.broadcast_to.default):
            x = self.by_name[x.name].args[0]
        t = self._type(x).shape
        if len(t) < 3 or t[-3] != heads or any(s != 1 for s in (*t[:-3], *t[-2:])):
            return None
        while self.by_name[x.name].op in (*VIEWS, *CASTS, aten.unsqueeze.default):
            inner = self.by_name[x.name].args[0]
            if self._type(inner).shape == (heads,):
                return inner
            x = inner
        return self._emit(aten.view.default, (x, (heads,)), (heads,), self._type(x).dtype)

    def _product(self, n: Node) -> tuple[Ref, Ref, Any] | None:
        """(weights [*lead, q, t], values [*lead, t, e], what makes the result of [*lead, q, e])."""
        if n.op not in PRODUCTS:
            return None
        if n.op == aten.einsum.default:
            return self._einsum_of_values(n)
        a, b = n.args[:2]
        shapes = self._type(a).shape, self._type(b).shape
        if min(map(len, shapes)) < 3 or shapes[0][:-2] != shapes[1][:-2]:
            return None
        return a, b, lambda out: out

    def _letters(self, n: Node) -> tuple[list[str], list[str], list[str]] | None:
        """Of an einsum of two operands whose dims are single letters."""
        match = re.fullmatch(r"(\w+),(\w+)->(\w+)", n.args[0].replace(" ", ""))
        if match is None or len(n.args[1]) != 2:
            return None
        a, b, out = map(list, match.groups())
        return (a, b, out) if all(len(set(x)) == len(x) for x in (a, b, out)) else None

    def _einsum_of_values(self, n: Node) -> tuple[Ref, Ref, Any] | None:
        letters = self._letters(n)
        if letters is None:
            return None
        a, b, out = letters
        *lead, q, t = a
        heads = [x for x in b if x not in a]
        if t not in b or q in b or len(heads) != 1 or set(out) != {*lead, q, *heads}:
            return None
        if not set(lead) <= set(b):
            return None
        values = self._permuted(n.args[1][1], b, [*lead, t, *heads])
        return (
            n.args[1][0],
            values,
            lambda attended: self._permuted(attended, [*lead, q, *heads], out),
        )

    def _softmax(self, weights: Ref) -> tuple[Ref, Ref | None, float, Sequence[Size]] | None:
        """(scores, sinks beside them, dropout, leading dims) of probabilities."""
        dropout, node, beside = 0.0, self._inner(weights), False
        while node is not None and node.op not in SOFTMAX:
            if node.op == aten.slice.Tensor and self._drops_a_column(node) and not beside:
                beside = True
            elif node.op == aten.dropout.default and not dropout:
                dropout = float(node.args[1]) if node.args[2] else 0.0
            elif node.op not in (*CASTS, *VIEWS) or not self._keeps_rows(node):
                return None
            node = self._inner(node.args[0])
        if node is None or node.args[1] % len(node.type.shape) != len(node.type.shape) - 1:
            return None
        pair = self._with_sinks(node.args[0]) if beside else (node.args[0], None)
        if pair is None or (beside and dropout):
            return None
        scores, sinks = pair
        return scores, sinks, dropout, node.type.shape[:-2]

    def _scores(self, r: Ref) -> _Scores | None:
        """Back from the softmax to the product of queries and keys."""
        lead = self._type(r).shape[:-2]
        scale, terms, node = 1.0, [], self._inner(r)
        steps: list[Step] = []  # the last one first
        while node is not None and node.op not in PRODUCTS:
            x, step = node.args[0], node.op
            if not all(t is not None and t.is_float for t in node.types):
                return None  # numbers are lost here, and gradients
            if step in CASTS or (step in VIEWS and self._keeps_rows(node)):
                pass
            elif step in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
                number = self._number(node.args[1])
                if number is None:
                    return None
                scale *= number if step in (aten.mul.Tensor, aten.mul.Scalar) else 1 / number
            elif _is_sum(node) or step in FILLS or step in WHERE:
                pair = None if steps else self._added(node, scale)
                if pair is None:
                    return None
                x, term = pair
                terms.append(self._term(term, node, lead))
            else:
                if scale != 1:
                    steps.append(("mul", (x, scale), {}))
                    scale = 1.0
                steps.append((step._schema.name.removeprefix("aten::"), node.args, node.kwargs))
            if isinstance(x, Ref) and self._type(x).shape[-2:] != node.type.shape[-2:]:
                return None  # broadcast here
            node = self._inner(x)
        pair = self._queries_and_keys(node) if node is not None and scale > 0 else None
        text = composed(steps)
        return None if pair is None or text is None else _Scores(*pair, scale, text, terms)

    def _added(self, n: Node, scale: float) -> tuple[Ref, Ref] | None:
        """(scores, what is added to them times the scale)."""
        if not _is_sum(n):
            return self._fill(n)
        sign = -1.0 if n.op == aten.sub.Tensor else 1.0
        x, m = n.args[:2]
        if sign > 0 and not self._leads(x):
            x, m = m, x
        if len(self._type(m).shape) > 4 or n.kwargs.get("alpha", 1) != 1:
            return None
        return x, self._times(m, sign * scale)

    def _term(self, m: Ref, at: Node, lead: Sequence[Size]) -> Ref:
        """What is added to scores of other leading dims than in the end, over those."""
        shape = self._type(m).shape
        if len(shape) < 3 or at.type.shape[:-2] == tuple(lead) or shape[:-2] != at.type.shape[:-2]:
            return m
        return self._led(m, lead)

    def _queries_and_keys(self, n: Node) -> tuple[Ref, Ref] | None:
        if n.op == aten.einsum.default:
            letters = self._letters(n)
            if letters is None:
                return None
            a, b, out = letters
            *lead, q, t = out
            reduced = [x for x in a if x not in out]
            if (
                len(reduced) != 1
                or set(a) != {*lead, q, *reduced}
                or set(b) != {*lead, t, *reduced}
            ):
                return None
            return (
                self._permuted(n.args[1][0], a, [*lead, q, *reduced]),
                self._permuted(n.args[1][1], b, [*lead, t, *reduced]),
            )
        a, b = n.args[:2]
        if len(self._type(a).shape) < 3 or self._type(a).shape[:-2] != self._type(b).shape[:-2]:
            return None
        return a, self._transposed(b)

    def _number(self, x: object) -> float | None:
        """A number, or a tensor that is filled with one."""
        if isinstance(x, (int, float)):
            return float(x) or None
        node = self.by_name[x.name] if isinstance(x, Ref) else None
        if node is not None and node.op == aten.full.default and not node.type.shape:
            return self._number(node.args[1])
        return None

    def _leads(self, x: object) -> bool:
        """A product of queries and keys is behind it, through values of one use."""
        node = self._inner(x)
        if node is None or node.name in self.replicated:
            return False
        return node.op in PRODUCTS or any(map(self._leads, node.refs()))

    def _is_mask(self, x: object) -> bool:
        return isinstance(x, Ref) and x.name in self.replicated and len(self._type(x).shape) <= 4

    def _fill(self, n: Node) -> tuple[Ref, Ref] | None:
        """(scores, additive mask) of a fill that leaves nothing of the score."""
        if n.op in FILLS:
            x, gone, value = n.args
        else:
            gone, value, x = n.args
            if not isinstance(x, Ref) or x.name in self.replicated:
                x, value = value, x
                gone = self._emit(aten.logical_not.default, (gone,), self._type(gone).shape)
        number = value
        if isinstance(value, Ref):
            node = self.by_name[value.name]
            number = node.args[1] if node.op == aten.full.default else None
            number = node.args[0] if node.op == aten.scalar_tensor.default else number
        if not isinstance(number, (int, float)) or number > ABSORBS or not self._is_mask(gone):
            return None
        if number > -math.inf and not self._is_safe(gone):
            return None  # no gradient reaches the scores of a row that is replaced as a whole
        dtype, shape = self._type(x).dtype, self._type(gone).shape
        zeros = self._emit(aten.zeros_like.default, (gone,), shape, dtype, {"dtype": dtype})
        args = (zeros, gone, float(number))
        return x, self._emit(aten.masked_fill.Scalar, args, shape, dtype)

    def _emit(
        self,
        op: OpOverload,
        args: Sequence[object],
        shape: Sequence[Size],
        dtype: torch.dtype = torch.bool,
        kwargs: Keywords | None = None,
    ) -> Ref:
        suffix = f"attend{len(self.b.nodes)}"
        out = self.b.of(op, tuple(args), shape, dtype, suffix, **(kwargs or {}))
        if all(r.name in self.replicated for r in self.b.nodes[-1].refs()):
            self.replicated.add(out.name)
        return out

    def _permuted(self, x: Ref, before: list[str], after: list[str]) -> Ref:
        if before == after:
            return x
        order = tuple(before.index(l) for l in after)
        t = self._type(x)
        return self._emit(aten.permute.default, (x, order), [t.shape[k] for k in order], t.dtype)

    def _transposed(self, x: Ref) -> Ref:
        t, node = self._type(x), self.by_name.get(x.name)
        rank = len(t.shape)
        swaps = {rank - 1, rank - 2}
        if node is not None and node.op == aten.transpose.int and _dims(node, rank) == swaps:
            return node.args[0]
        shape = (*t.shape[:-2], t.shape[-1], t.shape[-2])
        return self._emit(aten.transpose.int, (x, -2, -1), shape, t.dtype)

    def _led(self, x: Ref, lead: Sequence[Size]) -> Ref:
        """With these leading dims."""
        t = self._type(x)
        if t.shape[:-2] == tuple(lead):
            return x
        shape = (*lead, *t.shape[-2:])
        return self._emit(aten.reshape.default, (x, shape), shape, t.dtype)

    def _times(self, x: Ref, factor: float) -> Ref:
        if factor == 1:
            return x
        t = self._type(x)
        return self._emit(aten.mul.Scalar, (x, factor), t.shape, t.dtype)

    def _mask(self, terms: list[Ref], dtype: torch.dtype, at: int) -> Ref | None:
        """The sum of what is added to the scores; at: where three dims lack a fourth."""
        total: Ref | None = None
        for m in reversed(terms):
            if self._type(m).dtype != dtype:
                m = self._emit(aten.to.dtype, (m, dtype), self._type(m).shape, dtype)
            if len(shape := self._type(m).shape) == 3:
                shape = (*shape[:at], 1, *shape[at:])
                m = self._emit(aten.unsqueeze.default, (m, at), shape, dtype)
            if total is None:
                total = m
                continue
            shapes = [list(self._type(x).shape) for x in (total, m)]
            rank = max(map(len, shapes))
            padded = [[1] * (rank - len(s)) + s for s in shapes]
            shape = [b if a == 1 else a for a, b in zip(*padded)]
            total = self._emit(aten.add.Tensor, (total, m), shape, dtype)
        return total

    def _is_safe(self, gone: Ref) -> bool:
        """No row is filled as a whole."""
        if not self.types:
            expressions(self.program.nodes, self.env, self.types, self.refused)
        expressions(self.b.nodes, self.env, self.types)
        e = self.env.get(gone)
        mask = as_known(e, self.types[gone]) if e is not None else None
        return mask is not None and Known(negate(mask.predicate)).is_safe


def _dims(transposed: Node, rank: int) -> set[int]:
    return {d % rank for d in transposed.args[1:3]}


def _is_sum(n: Node) -> bool:
    return n.op in (aten.add.Tensor, aten.sub.Tensor) and isinstance(n.args[1], Ref)
