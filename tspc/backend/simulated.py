"""Simulated ranks: a backend that runs a graph on D ranks in this process, for `tspc.verify` and
the tests.

The model keeps its whole parameters; each call cuts them into the ranks' shards, runs the
partitioned forward and backward graphs in lockstep and assembles whole outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from tspc.base.context import Context
from tspc.base.errors import TspcError
from tspc.base.options import Options
from tspc.frontend.autocast import off
from tspc.frontend.capture import Captured, capture
from tspc.frontend.overlap import before_writes, dense, overlap, written
from tspc.ir.body import evaluate
from tspc.ir.layout import Span
from tspc.ir.program import PARAM, PLACEHOLDERS, Type
from tspc.ops.run import LocalProgram
from tspc.passes.analyse.outputs import Result
from tspc.passes.analyse.refused import Refused
from tspc.passes.ladder import climb
from tspc.passes.lower.unit import Unit
from tspc.runtime import simulate
from tspc.runtime.call.lookups import Indices
from tspc.runtime.comm.drivers import lockstep
from tspc.runtime.comm.exchange import clear, take, whole
from tspc.runtime.comm.seed import draw
from tspc.runtime.lowering.trace import Partitioned, local_fakes, partition
from tspc.seams.compiler import outside_of_dynamo, plainly

AXIS = "simulated"


@dataclass
class Simulated:
    """One graph on D ranks."""

    ranks: int
    captured: Captured
    rewritten: Unit
    parts: Partitioned
    sizes: dict[sympy.Symbol, int] = field(default_factory=dict)
    saved_elements: int = 0  # of rank 0, by the last forward

    def rows(self) -> list[int]:
        """C of each sequence."""
        return [int(e.chunk_rows(self.ranks, self.sizes)) for e in self.rewritten.choice.extents]

    def where(self, r: Result) -> tuple[Span, tuple[int, int]]:
        """The sequence of an output, and (dim, lead)."""
        extent = self.rewritten.choice.extents[r.sequence]
        lead, length = (int(evaluate(n, self.sizes)) for n in (r.lead, extent.length))
        span = Span(extent.layout(self.ranks), self.rows()[r.sequence], length)
        return span, (r.dim, lead)


def simulated_backend(
    ranks: int, options: Options | None = None, graphs: list[Simulated] | None = None
) -> Callable[..., object]:
    """A Dynamo backend; `graphs` collects what it makes, in order."""
    chosen = options or Options()

    @plainly(TspcError)
    def backend(
        gm: torch.fx.GraphModule, example_inputs: Sequence[object]
    ) -> Callable[..., object]:
        captured = capture(gm, example_inputs, param_dtype=chosen.param_dtype)
        with off():
            return simulate_graph(captured, example_inputs)

    def simulate_graph(
        captured: Captured, example_inputs: Sequence[object]
    ) -> Callable[..., object]:
        def attempt(refused: Refused) -> Simulated:
            rewritten = captured.rewritten(ranks, AXIS, chosen, "cpu", refused)
            parts = _trace(captured, rewritten, example_inputs, ranks)
            return Simulated(ranks, captured, rewritten, parts)

        graph = climb(attempt, captured.program, chosen.strict)
        if graphs is not None:
            graphs.append(graph)
        indices = Indices(graph.rewritten.lookups, torch.device("cpu"))
        return lambda *args: _call(graph, args, indices)

    return backend


def _trace(
    captured: Captured, rewritten: Unit, example_inputs: Sequence[object], ranks: int
) -> Partitioned:
    hints = captured.program.hints
    rows = [int(e.chunk_rows(ranks, hints)) for e in rewritten.choice.extents]
    types: list[tuple[Type, torch.device]] = []
    nodes = [n for n in rewritten.typed.program.nodes if n.op in PLACEHOLDERS]
    for n, x in zip(nodes, captured.given(nodes, example_inputs, torch.zeros(()))):
        types.append((rewritten.stored(n), x.device))
    fakes = local_fakes(rewritten.symbols, hints, rows, types)
    sizes = (*rewritten.symbols, *rewritten.chunks)
    return partition(LocalProgram(rewritten.local, sizes), fakes)


def _call(graph: Simulated, args: Sequence[object], indices: Indices) -> list[object]:
    graph.sizes = graph.captured.sizes(args)
    wrong = indices(graph.sizes, {n: args[i] for n, i in graph.captured.positions.items()})
    if wrong is not None:
        raise wrong
    nodes = [n for n in graph.rewritten.typed.program.nodes if n.op in PLACEHOLDERS]
    drawn = draw() if graph.rewritten.draws else torch.zeros(())
    wrong = overlap(graph.captured.writes, args, graph.captured.names)
    if wrong is not None:
        raise wrong
    kept = before_writes(graph.captured.writes, args)
    tensors = map(dense, graph.captured.given(nodes, kept, drawn))
    outs = [
        x if r is None else r.given(x, graph.sizes)
        for x, r in zip(_Run.apply(graph, *tensors), graph.rewritten.results)
    ]
    return written(graph.captured.writes, graph.captured.same, args, outs)


class _Run(torch.autograd.Function):
    """All ranks' forward and backward as one autograd node over the whole tensors."""

    @staticmethod
    def forward(ctx: Context, graph: Simulated, *tensors: torch.Tensor) -> object:
        ctx.graph = graph
        with off():
            return _Run._forward(ctx, graph, tensors)

    @staticmethod
    def _forward(ctx: Context, graph: Simulated, tensors: Sequence[torch.Tensor]) -> object:
        base = [*(graph.sizes[s] for s in graph.rewritten.symbols), *graph.rows()]
        shards = _shards(graph, tensors)
        inputs = [[*base, *(s[rank] for s in shards)] for rank in range(graph.ranks)]
        results = simulate.run(graph.parts.forward, AXIS, inputs)
        count = graph.parts.outputs
        ctx.saved = [r[count:] for r in results]
        graph.saved_elements = sum(x.numel() for x in ctx.saved[0] if isinstance(x, torch.Tensor))
        outs = _assemble(graph, [r[:count] for r in results])
        plain = [o for i, o in enumerate(outs) if i not in graph.parts.tangents]
        ctx.mark_non_differentiable(*(o for o in plain if isinstance(o, torch.Tensor)))
        ctx.shapes = [
            o.new_zeros(()).expand(o.shape) if isinstance(o, torch.Tensor) else None for o in outs
        ]
        return tuple(outs)

    @staticmethod
    @outside_of_dynamo
    def backward(ctx: Context, *gs: torch.Tensor) -> object:
        with off():
            return _Run._backward(ctx, gs)

    @staticmethod
    def _backward(ctx: Context, gs: Sequence[torch.Tensor]) -> object:
        graph: Simulated = ctx.graph
        tangents = {i: gs[i] if gs[i] is not None else ctx.shapes[i] for i in graph.parts.tangents}
        backward = graph.parts.backward
        assert backward is not None
        forward_out = next(n for n in graph.parts.forward.graph.nodes if n.op == "output")
        names = [n.name for n in forward_out.args[0][graph.parts.outputs :]]
        inputs = []
        for rank, saved in enumerate(ctx.saved):
            local = [_tangent(graph, rank, i, g) for i, g in tangents.items()]
            by_name, grads_left = dict(zip(names, saved)), iter(local)
            holders = [n for n in backward.graph.nodes if n.op == "placeholder"]
            inputs.append(
                [by_name[n.name] if n.name in by_name else next(grads_left) for n in holders]
            )
        grads = simulate.run(backward, AXIS, inputs)
        skip = len(graph.rewritten.symbols) + len(graph.rewritten.choice.extents)
        return (None, *_whole_gradients(graph, [g[skip:] for g in grads]))


def _tangent(graph: Simulated, rank: int, index: int, g: torch.Tensor) -> torch.Tensor:
    """A rank's part of the cotangent of an output."""
    r = graph.rewritten.results[index]
    if r is None or r.kind == "whole":
        return g
    span, at = graph.where(r)
    return clear(span, rank, take(span, rank, g, *at), *at)


def _shards(graph: Simulated, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Per placeholder, each rank's tensor."""
    nodes = [n for n in graph.rewritten.typed.program.nodes if n.op in PLACEHOLDERS]
    out = []
    for n, x in zip(nodes, tensors):
        storage = graph.rewritten.choice.storages.get(n.name) if n.op == PARAM else None
        x = x.detach()
        if storage is not None and storage.map is not None:
            out.append([storage.map.take(x, j) for j in range(graph.ranks)])
        else:
            out.append([x] * graph.ranks)
    return out


def _whole_gradients(
    graph: Simulated, grads: list[list[torch.Tensor | None]]
) -> list[torch.Tensor | None]:
    nodes = [n for n in graph.rewritten.typed.program.nodes if n.op in PLACEHOLDERS]
    out = []
    for i, n in enumerate(nodes):
        present = [x for x in (g[i] for g in grads) if x is not None]
        assert len(present) in (0, graph.ranks), f"only some ranks have a gradient of {n.name}"
        storage = graph.rewritten.choice.storages.get(n.name) if n.op == PARAM else None
        if not present:
            out.append(None)
        elif storage is not None and storage.map is not None:
            out.append(storage.map.put(present, int(n.type.shape[storage.map.dim])))
        else:
            for other in present[1:]:
                assert torch.equal(other, present[0]), f"ranks differ in the gradient of {n.name}"
            out.append(present[0])
    return out


def _assemble(graph: Simulated, outs: list[list[Any]]) -> list[object]:
    """Whole outputs; what is whole on every rank must be equal there."""
    result = []
    for i, r in enumerate(graph.rewritten.results):
        parts = [o[i] for o in outs]
        if r is None or r.kind == "whole":
            for other in parts[1:]:
                same = not isinstance(other, torch.Tensor) or torch.equal(
                    torch.nan_to_num(other.double()), torch.nan_to_num(parts[0].double())
                )
                assert same, f"ranks differ in output {i}"
            result.append(parts[0])
            continue
        span, at = graph.where(r)
        result.append(lockstep([whole(span, x, *at) for x in parts])[0])
    return result


def relative_errors(
    values: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """|x - x1| / max(|x1|, 1e-3 |X1|), X1 all tensors of the kind together."""
    total = sum(float(t.double().norm()) ** 2 for t in reference.values()) ** 0.5
    out = {}
    for name, one in reference.items():
        difference = float((values[name].double() - one.double()).norm())
        scale = max(float(one.double().norm()), 1e-3 * total)
        out[name] = difference / scale if scale else difference
    return out
