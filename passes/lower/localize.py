"""Re-execute programs node by node on the tensors of one rank: sizes become local, conversions
become tspc's ops.

In: a `Typed` program and its bodies. Out: a plain function on tensors and sizes, to be traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.types import IntLikeType

from tspc.factors.factor import Dims, Factor, norm
from tspc.ir.body import Body, rows_of
from tspc.ir.kinds import (
    ALL_REDUCE,
    CLEAR,
    EMBED,
    GATHER_WEIGHT,
    LOCAL,
    VARY,
    WHOLE,
)
from tspc.ir.program import (
    APART,
    CONSTANT,
    FOLD,
    OUTPUT,
    PLACEHOLDERS,
    Node,
    Program,
    Ref,
    Size,
    Type,
)
from tspc.ops.attention import ATTENTION, bound
from tspc.ops.library import local_rows
from tspc.ops.recompute import recomputed
from tspc.passes.analyse.factorize import Record
from tspc.passes.analyse.fold import Fold
from tspc.passes.analyse.outputs import Result
from tspc.passes.analyse.sizes import Length, Sizes
from tspc.passes.analyse.typed import Typed
from tspc.passes.lower.run_apart import run_apart
from tspc.passes.lower.run_op import Results, call, constant
from tspc.passes.lower.sequence_ops import Geometry, run, runs


class LocalProgram(torch.nn.Module):
    """One rank's program: (symbols in order, rows c of each sequence, placeholders in order) ->
    outputs; traceable with local fakes."""

    def __init__(
        self,
        typed: Typed,
        bodies: Mapping[str, Body],
        symbols: Sequence[sympy.Symbol],
        orders: Mapping[Factor, str],
        axis: str,
        local: Mapping[int, str],
        reduce: torch.dtype | None = None,
    ):
        super().__init__()
        self.typed, self.bodies = typed, bodies
        self.symbols, self.axis = tuple(symbols), axis
        self.orders = tuple(orders[f] for f in typed.leaves) or ("contiguous",)
        self.local, self.reduce = local, reduce
        self.leaving = _leaving(typed.program)
        self.placeholders = [n.name for n in typed.program.nodes if n.op in PLACEHOLDERS]
        self.kinds = [r.kind if r is not None else "whole" for r in self.results()]

    def forward(self, *args: Any) -> list[torch.Tensor | IntLikeType]:
        """Runs the nodes in order."""
        count = len(self.symbols)
        symbols = dict(zip(self.symbols, args[:count]))
        first = count + len(self.orders)
        run = _Run(self, symbols, args[count:first])
        for name, value in zip(self.placeholders, args[first:]):
            run.env[name, 0] = value
        run.vary_parameters()
        for node in self.typed.program.nodes:
            if node.op == OUTPUT:
                return [run.result(i, a) for i, a in enumerate(node.args)]
            if node.op not in PLACEHOLDERS:
                run.node(node)
        raise AssertionError("a program without output")

    def program(self) -> Program:
        """With the shapes that one rank has, `rows` of the first sequence."""
        typed = self.typed
        rows: dict[Factor, Length] = {f: rows_of(i) for i, f in enumerate(typed.leaves)}
        sizes = Sizes(typed.factors, {s: s for s in self.symbols}, rows)

        def local(n: Node, item: int, t: Type | None) -> Type | None:
            if t is None or typed.places.get((n.name, item)) not in ("S", "P"):
                return t
            return replace(t, shape=tuple(norm(sizes.dim(d)) for d in typed.dims[n.name, item]))

        nodes = typed.program.nodes
        types = [tuple(local(n, i, t) for i, t in enumerate(n.types)) for n in nodes]
        return replace(
            typed.program, nodes=tuple(replace(n, types=t) for n, t in zip(nodes, types))
        )

    def results(self) -> list[Result | None]:
        """How each output leaves; shapes are the whole ones, over the symbols."""
        typed = self.typed
        sizes = Sizes(typed.factors, {s: s for s in self.symbols}, {})
        types = {n.name: n.types for n in typed.program.nodes}
        out: list[Result | None] = []
        for i, a in enumerate(typed.program.output.args):
            if not isinstance(a, Ref):
                out.append(None)
                continue
            t = types[a.name][a.item or 0]
            assert t is not None
            shape = tuple(t.shape)
            kind, dim, lead, sequence = "whole", 0, 1, 0
            if i in self.local and typed.places[a.name, a.item or 0] == "S":
                dims = typed.dims[a.name, a.item or 0]
                sequence = typed.sequence(dims) or 0
                dim, lead, _ = sizes.where(dims, typed.leaves[sequence])
                # a DTensor cuts a dim as a whole, not the sequence inside of it
                kind = "whole" if self.local[i] == "sharded" and lead != 1 else self.local[i]
            out.append(Result(kind, shape, t.dtype, dim, lead, sequence=sequence))
        return out


def _leaving(program: Program) -> frozenset[str]:
    """What a checkpointed part makes for others. A fold does not count: it would keep what it saves
    for its backward too."""
    groups = {n.name: n.recompute for n in program.nodes if n.op != FOLD}
    return frozenset(
        r.name
        for n in program.nodes
        for r in n.refs()
        if groups.get(r.name, 0) not in (0, n.recompute)
    )


class _Run:
    """One execution of a local program."""

    def __init__(
        self,
        program: LocalProgram,
        symbols: dict[sympy.Symbol, IntLikeType],
        rows: Sequence[IntLikeType],
    ):
        typed = program.typed
        self.program, self.typed, self.rows = program, typed, rows
        cut = {f: local_rows(c, order) for f, c, order in zip(typed.leaves, rows, program.orders)}
        self.sizes = Sizes(typed.factors, symbols, cut)
        self.whole = Sizes(typed.factors, symbols, {})
        self.lengths = [self.sizes.value(f.size) for f in typed.leaves]
        self.env: dict[tuple[str, int], torch.Tensor] = {}

    def get(self, ref: Ref) -> torch.Tensor:
        return self.env[ref.name, ref.item or 0]

    def dims(self, ref: Ref) -> Dims:
        return self.typed.dims[ref.name, ref.item or 0]

    def index(self, dims: Dims) -> int:
        """Which sequence these dims have."""
        i = self.typed.sequence(dims)
        assert i is not None, "no sequence in these dims"
        return i

    def sequence(self, dims: Dims) -> Geometry:
        i = self.index(dims)
        dim, lead, trail = self.sizes.where(dims, self.typed.leaves[i])
        layout = (self.rows[i], self.lengths[i], self.program.orders[i], self.program.axis)
        return dim, lead, trail, *layout

    def vary_parameters(self) -> None:
        """All replicated parameters that vary, in one op: their gradients are one all-reduce."""
        nodes = [n for n in self.typed.program.nodes if n.op == VARY and self.is_given(n.args[0])]
        if nodes:
            params = [self.get(n.args[0]) for n in nodes]
            got = torch.ops.tspc.vary(params, self.program.reduce, self.program.axis)
            for n, x in zip(nodes, got):
                self.env[n.name, 0] = x

    def is_given(self, ref: Ref) -> bool:
        return (ref.name, 0) in self.env and ref.name in self.program.placeholders

    def node(self, n: Node) -> None:
        if (n.name, 0) in self.env:
            return
        with recomputed(n.recompute, n.name in self.program.leaving):
            value = self.value(n)
        for item, v in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            t = n.types[item] if item < len(n.types) else None
            if (
                isinstance(v, torch.Tensor)
                and t is not None
                and v.requires_grad
                and not t.requires_grad
            ):
                v = v.detach()
            self.env[n.name, item] = v

    def value(self, n: Node) -> Results:
        tspc, axis = torch.ops.tspc, self.program.axis
        if n.op == CONSTANT:
            devices = (v.device for v in self.env.values() if isinstance(v, torch.Tensor))
            return constant(n, next(devices, torch.device("cpu")))
        if n.op == FOLD:
            return self.fold(n)
        if n.op == APART:
            return run_apart(n, self.sizes, self.get)
        if n.op in (LOCAL, WHOLE, CLEAR):
            here = self.dims(Ref(n.name))
            return getattr(tspc, n.op)(self.get(n.args[0]), *self.sequence(here))
        if n.op == ALL_REDUCE:
            return tspc.all_reduce(self.get(n.args[0]), axis)
        if n.op == VARY:
            return tspc.vary([self.get(n.args[0])], self.program.reduce, axis)[0]
        if n.op in (GATHER_WEIGHT, GATHER_WEIGHT + "_r"):
            dim, size = n.kwargs["dim"], int(n.type.shape[n.kwargs["dim"]])
            flags = (n.op == GATHER_WEIGHT, n.type.dtype, self.program.reduce, axis)
            return tspc.gather_weight(self.get(n.args[0]), dim, size, *flags)
        if n.op == EMBED:
            table, ids = map(self.get, n.args)
            _, _, _, *layout = self.sequence(self.dims(Ref(n.name)))
            return tspc.embed(table, ids, *n.kwargs.values(), n.type.dtype, *layout)
        record = self.typed.records.get(n.name)
        if n.op == ATTENTION and record is not None and self.exchanges(record):
            return self.attention(n, record)
        if self.typed.places[n.name, 0] == "S" and runs(
            self.typed.factors, record, self.typed.leaves
        ):
            return run(n, self.sequence(self.dims(Ref(n.name))), self.get)
        base = record or self.typed.records.get(n.name.removesuffix(".partial"))
        sizes = self.sizes if self.typed.places[n.name, 0] in ("S", "P") else self.whole
        if base is None:
            dims = [self.dims(Ref(n.name, i)) for i in range(len(n.types))]
            ins: list[Dims] = [self.dims(r) for r in n.refs()]
            return call(n, ins, dims, sizes, self.get)
        return call(n, base.ins, base.outs, sizes, self.get)

    def exchanges(self, record: Record) -> bool:
        """The op is cut along the sequence and meets it across ranks."""
        roles = [x for leaf in self.typed.leaves for x in record.roles.get(leaf, ())]
        here = self.typed.places[record.node.name, 0] == "S"
        return here and any(role == "exchange" for role, *_ in roles)

    def attention(self, n: Node, record: Record) -> Any:
        x, a = bound(n)
        assert x.sinks is None, "its sinks are in no fold"
        a = replace(a, sizes=tuple(self.sizes.value(s) for s in a.sizes))
        pair = [self.index(d) for d in record.ins[:2]]
        facts = self.rows, self.lengths, self.program.orders
        sequences = ([fact[i] for i in pair] for fact in facts)
        tensors = x.map(self.get).all[:6]
        out, _ = torch.ops.tspc.attention(*tensors, *a.all, *sequences, self.program.axis)
        return out

    def fold(self, n: Node) -> list[torch.Tensor]:
        fold: Fold = n.kwargs["fold"]
        body = self.program.bodies[fold.name]
        tokens, invariants, sliced, weights = ([self.get(r) for r in g] for g in n.args)
        values = [self.sizes.symbols[s] for s in body.symbols]
        sequences = self.typed.sequences_of(fold)
        sizes = ([x[i] for i in sequences] for x in (self.rows, self.lengths))
        operands = (values, *sizes, fold.name, body.key, self.program.axis)
        got = torch.ops.tspc.fold(tokens, [*invariants, *sliced], weights, *operands)
        out = []
        for e, x in zip(fold.exits, got):
            if e.kind == "lse":
                x = torch.logsumexp(x, 0)
            elif e.kind == "stack":
                x = self.unstack(x, e.dims, fold)
            out.append(x)
        return out

    def unstack(self, x: torch.Tensor, dims: Dims, fold: Fold) -> torch.Tensor:
        """[D, local with units of one shard] -> local with all units, pads dropped."""
        f = fold.factor
        for k, d in enumerate(dims):
            if f in self.sizes.factors.leaves(tuple(d)):
                lead, trail = self.sizes.around(d, f)
                if type(lead) is int and lead == 1:
                    whole = x.movedim(0, k).flatten(k, k + 1)
                    pads = x.shape[0] * fold.units != fold.size
                    return whole.narrow(k, 0, fold.size * trail) if pads else whole
                ranks, shape = x.shape[0], list(x.shape[1:])
                parts = x.reshape(ranks, *shape[:k], lead, fold.units, trail, *shape[k + 1 :])
                parts = parts.movedim(0, k + 1).flatten(k + 1, k + 2).narrow(k + 1, 0, fold.size)
                return parts.reshape(*shape[:k], lead * fold.size * trail, *shape[k + 1 :])
        raise AssertionError("a stacked exit without its factor")

    def result(self, index: int, a: Ref | Size) -> torch.Tensor | IntLikeType:
        """As `results` says."""
        if not isinstance(a, Ref):
            return self.sizes.value(a)
        x = self.get(a)
        if self.typed.places[a.name, a.item or 0] != "S":
            node = self.typed.program.node(a.name)
            held = node.op in PLACEHOLDERS or node.is_call and node.op.is_view
            return x.clone() if held else x  # no output is an input or a view
        kind = self.program.kinds[index]
        if kind != "whole":
            return x.detach() if kind == "deferred" else x.clone()  # no view of an input
        return torch.ops.tspc.whole(x, *self.sequence(self.dims(a)))
