"""A Dynamo graph -> forward ATen `Program` with symbolic sizes, high-level ops kept whole.

In: the graph module and example inputs that Dynamo hands to a backend. Out: `Captured`, the
program and where each of its values comes from at a call. Sharded parameters (`to_local` ->
`tspc::whole_weight`) appear as whole "param" placeholders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch.fx.experimental.proxy_tensor import make_fx, maybe_enable_thunkify
from torch.fx.traceback import preserve_node_meta

from tspc.base.errors import CaptureError, UnsupportedError
from tspc.base.hardware import hardware
from tspc.base.options import Options
from tspc.frontend import autocast as precision
from tspc.frontend import autograd_function as custom
from tspc.frontend import checkpoint, scalars
from tspc.frontend import flex_attention as flex
from tspc.frontend import reject as refused
from tspc.frontend import vmap as batched
from tspc.frontend.autograd_grad import is_input
from tspc.frontend.decompose import taken_apart
from tspc.frontend.from_fx import convert
from tspc.frontend.overwritten import Overwriting
from tspc.ir.body import registered
from tspc.ir.program import (
    BUFFER,
    INPUT,
    PARAM,
    SEED,
    Node,
    Program,
)
from tspc.ir.source import graph_break
from tspc.passes.analyse.refused import NOTHING, Refused
from tspc.passes.lower.unit import Unit
from tspc.passes.pipeline import rewrite
from tspc.seams.compiler import source_name
from tspc.seams.lowering import TracingContext, has_data_mutation
from tspc.seams.tensors import FakeTensor, FakeTensorMode, FunctionalTensor, dispatch_functionalize


@dataclass(frozen=True)
class Captured:
    """A Dynamo graph as a program.

    positions: placeholder name -> index among the graph's inputs. symbols: symbol -> (index, dim |
    None if a SymInt).
    """

    program: Program
    positions: dict[str, int]
    symbols: dict[sympy.Symbol, tuple[int, int | None]]
    outer_symbols: dict[sympy.Symbol, torch.SymInt]
    graph_break: str  # where the graph ends in one, else "": every output then comes back whole
    writes: tuple[int, ...] = ()  # graph inputs that get the last outputs at the end of a call
    same: Mapping[int, int] = field(default_factory=dict)  # output -> the written input that it is

    @cached_property
    def names(self) -> dict[int, str]:
        """Graph input -> its placeholder."""
        return {i: n for n, i in self.positions.items()}

    def given(
        self, nodes: Sequence[Node], args: Sequence[object], seed: torch.Tensor | None
    ) -> list[Any]:
        """What each of these placeholders is at a call."""
        return [seed if n.name == SEED else args[self.positions[n.name]] for n in nodes]

    def rewritten(
        self, ranks: int, axis: str, options: Options, device: str, refused: Refused = NOTHING
    ) -> Unit:
        """What the passes make of it. device: its name, for the cost model's table."""
        if self.graph_break:
            options = replace(options, outputs="full")
        if not torch.is_grad_enabled():
            options = replace(options, memory_budget="min")
        symbols = tuple(sorted(self.symbols, key=str))
        asked = (ranks, axis, options, hardware(options.hardware, device), len(self.writes))
        unit = rewrite(Unit(self.program, symbols, *asked, refused, self.graph_break))
        return replace(unit, bodies=registered(unit.bodies))

    def sizes(self, args: Sequence[Any]) -> dict[sympy.Symbol, int]:
        """The value of each symbol at a call."""
        return {
            s: int(args[i] if d is None else args[i].shape[d]) for s, (i, d) in self.symbols.items()
        }


class _Trace:
    """The graph as it is traced. writes: inputs that it writes into. same: output -> the written
    input that it is."""

    def __init__(
        self,
        gm: torch.fx.GraphModule,
        kinds: list[tuple[str, str]],
        functional: precision.OneType,
    ):
        self.gm, self.kinds, self.functional = gm, kinds, functional
        self.writes: list[int] = []
        self.same: dict[int, int] = {}

    def run(self, *args: Any) -> list[object]:
        cast = self.functional.cast
        arguments = [cast(a) if k == PARAM else a for a, (k, _) in zip(args, self.kinds)]
        grads = [isinstance(a, torch.Tensor) and a.requires_grad for a in arguments]
        params = {i for i, (kind, _) in enumerate(self.kinds) if kind == PARAM and grads[i]}
        interpreter = Overwriting(self.gm, self.kinds, params)
        with maybe_enable_thunkify():  # sizes are no nodes
            out = interpreter.run(*arguments)
        assert isinstance(out, (list, tuple))
        for i, ((kind, wanted), x, a) in enumerate(zip(self.kinds, arguments, args)):
            if isinstance(x, FunctionalTensor) and has_data_mutation(x):
                if grads[i] and i not in interpreter.places or x is not a:
                    raise UnsupportedError(
                        f"{wanted}: the model writes into this {kind} in its forward, and its "
                        "gradient would not see it; write into a buffer, or between the calls"
                    )
                self.writes.append(i)
        read = [(at, i) for at, x in enumerate(out) for i in self.writes if is_input(x, args[i])]
        self.same.update(read)
        kept = [None if at in self.same else x for at, x in enumerate(out)]
        return [*kept, *(args[i].detach() for i in self.writes)]


def capture(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    name: str = "graph",
    param_dtype: torch.dtype | None = None,
) -> Captured:
    """Retrace a Dynamo graph with `make_fx(pre_dispatch=True)`, functionalized, under Dynamo's
    own fake mode; autocast and `param_dtype` become casts."""
    context = TracingContext.get()
    assert context.fake_mode is not None
    kinds = _kinds(gm, example_inputs)
    refused.check(gm)
    scalars.fixed_inside(gm)
    gm = checkpoint.inlined(flex.inlined(gm))
    fakes = [_fake(context, x) for x in example_inputs]
    gm, fakes = _cut_whole_weights(gm, fakes, context.fake_mode)
    around = precision.ambient()
    batched.inlined(gm, fakes, context.fake_mode)
    custom.inlined(gm, fakes, context.fake_mode)
    trace = _Trace(gm, kinds, precision.OneType(param_dtype))
    with context.fake_mode, torch.enable_grad(), preserve_node_meta():
        traced = make_fx(
            dispatch_functionalize(trace.run, trace.functional),
            taken_apart(),
            pre_dispatch=True,
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*fakes)
        traced = precision.explicit(traced, around, fakes)
        scalars.as_tensors(traced)
    env = context.fake_mode.shape_env
    sizes = getattr(env, "backed_var_to_val", {})
    hints = {s: int(v) for s, v in sizes.items() if s.is_integer}
    grads = [isinstance(x, torch.Tensor) and x.requires_grad for x in fakes]
    program, positions = convert(name, traced, kinds, grads, hints)
    symbols, outer = _symbols(fakes)
    writes = tuple(trace.writes), trace.same
    return Captured(program, positions, symbols, outer, graph_break(gm), *writes)


def _fake(context: TracingContext, x: object) -> object:
    ours = isinstance(x, FakeTensor) and x.fake_mode is context.fake_mode
    if ours or not isinstance(x, torch.Tensor):
        return x
    symbolic = context.tensor_to_context[x]
    source = getattr(symbolic, "tensor_source", None)
    assert context.fake_mode is not None
    return context.fake_mode.from_tensor(x, symbolic_context=symbolic, source=source)


def _kinds(gm: torch.fx.GraphModule, example_inputs: Sequence[object]) -> list[tuple[str, str]]:
    """(kind, name) of each graph input; parameters and buffers by their qualified name."""
    out = []
    for node, x in zip(gm.graph.find_nodes(op="placeholder"), example_inputs):
        source = getattr(node, "_dynamo_source", None)
        text = source_name(node)
        path = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", text)
        of_module = source is not None and "_NN_MODULE" in source.guard_source.name
        if isinstance(x, torch.nn.Parameter):
            kind = PARAM
        elif of_module and isinstance(x, torch.Tensor):
            kind = BUFFER
        else:
            kind = INPUT
        plain = re.sub(r"\W+", "_", text.replace("L['", "").replace("']", "")).strip("_")
        out.append((kind, ".".join(path) if path and kind != INPUT else plain or node.name))
    return out


def _cut_whole_weights(
    gm: torch.fx.GraphModule, fakes: list[object], mode: FakeTensorMode
) -> tuple[torch.fx.GraphModule, list[object]]:
    """DTensor placeholder -> to_local -> tspc::whole_weight becomes the placeholder of a whole
    weight."""
    target = getattr(torch.ops.tspc, "whole_weight", None)
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    placeholders = list(graph.find_nodes(op="placeholder"))
    out = list(fakes)
    for i, node in enumerate(placeholders):
        fake = fakes[i]
        if not isinstance(fake, torch.Tensor) or not hasattr(fake, "_spec"):
            continue
        for local in list(node.users):
            for whole in list(local.users):
                if target is None or whole.target not in (target, target.default):
                    raise CaptureError(
                        f"{node.name}: a sharded parameter is used other than through its "
                        "module's attribute"
                    )
                whole.replace_all_uses_with(node)
                graph.erase_node(whole)
            graph.erase_node(local)
        with mode:
            whole_fake = torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)
        out[i] = whole_fake.requires_grad_(fake.requires_grad)
    cut = torch.fx.GraphModule(gm, graph)
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None:
        object.__setattr__(cut, "compile_subgraph_reason", reason)
    return cut, out


def _symbols(
    fakes: Sequence[object],
) -> tuple[dict[sympy.Symbol, tuple[int, int | None]], dict[sympy.Symbol, torch.SymInt]]:
    where: dict[sympy.Symbol, tuple[int, int | None]] = {}
    outer: dict[sympy.Symbol, torch.SymInt] = {}

    def add(size: object, place: tuple[int, int | None]) -> None:
        if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
            where.setdefault(size.node.expr, place)
            outer.setdefault(size.node.expr, size)

    for i, x in enumerate(fakes):
        add(x, (i, None))
    for i, x in enumerate(fakes):
        for d, size in enumerate(x.shape if isinstance(x, torch.Tensor) else ()):
            add(size, (i, d))
    return where, outer
