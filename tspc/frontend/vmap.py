"""What a Dynamo graph computes under vmap becomes plain ops over the batched dims.

In: a graph module, changed in place, and what its placeholders are. `make_fx(pre_dispatch=True)`
cannot trace functorch's batched tensors, so each loop is traced alone, below autograd, and its ops
take its place (they are differentiable as any others).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Argument, map_arg
from torch.fx.traceback import preserve_node_meta

from tspc.base.errors import UnsupportedError
from tspc.ir.source import source_line
from tspc.seams.compiler import NESTING
from tspc.seams.tensors import FakeTensorMode, HigherOrderOperator

Node = torch.fx.Node
Value = TypeVar("Value")


def inlined(gm: torch.fx.GraphModule, inputs: Sequence[object], mode: FakeTensorMode) -> None:
    """inputs: fake tensors and SymInts of the placeholders, of the fake mode `mode`.

    Raises `UnsupportedError` for a loop that turns gradients off in part or holds a function with
    a backward of its own: neither would be seen.
    """
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs))
    for loop in list(_loops(gm.graph)):
        for n in loop:
            if "_set_grad_enabled" in str(n.target):
                _refuse(loop, "no_grad")
            if isinstance(n.target, HigherOrderOperator):
                _refuse(loop, str(n.target))
        _replace(gm, loop, values, mode)
    gm.graph.lint()
    gm.recompile()


def _refuse(loop: Sequence[Node], what: str) -> None:
    where = next(filter(None, map(source_line, loop)), loop[0].name)
    raise UnsupportedError(
        f"{where}: {what} inside a function that vmap maps; take it out of the "
        "mapped function, or write the batched dim out"
    )


def _loops(graph: torch.fx.Graph) -> Iterator[list[Node]]:
    """The nodes of each outermost loop, from its opening to its closing."""
    depth, loop = 0, []
    for n in graph.nodes:
        kind = NESTING.get(n.target) if n.op == "call_function" else None
        depth += kind == "open"
        if depth:
            loop.append(n)
        depth -= kind == "close"
        if loop and not depth:
            yield loop
            loop = []


def _replace(
    gm: torch.fx.GraphModule, loop: Sequence[Node], values: dict[Node, object], mode: FakeTensorMode
) -> None:
    inside = set(loop)
    inputs = list(dict.fromkeys(x for n in loop for x in n.all_input_nodes if x not in inside))
    outputs = [n for n in loop if any(u not in inside for u in n.users)]
    alone = torch.fx.Graph()
    env = {
        x: alone.node_copy(x) if x.op == "get_attr" else alone.placeholder(x.name) for x in inputs
    }
    for n in loop:
        env[n] = alone.node_copy(n, env.__getitem__)
    alone.output(tuple(env[n] for n in outputs))
    section = torch.fx.GraphModule(gm, alone)
    inputs = [x for x in inputs if x.op != "get_attr"]
    args = [values[x] if x in values else like(x.meta["example_value"], mode) for x in inputs]
    with mode, torch.no_grad(), preserve_node_meta():
        traced = make_fx(
            torch.fx.Interpreter(section).run, tracing_mode="real", _allow_non_fake_inputs=True
        )(*args)
    with gm.graph.inserting_before(loop[0]):
        results = copied(gm, traced, inputs)
    for n, new in zip(outputs, results):
        for user in [u for u in n.users if u not in inside]:
            user.args, user.kwargs = map_arg(
                (user.args, user.kwargs), lambda a, n=n, new=new: new if a is n else a
            )
        if isinstance(new, Node):  # a size may have become a number
            new.meta["example_value"] = n.meta.get("example_value")
    for n in reversed(loop):
        gm.graph.erase_node(n)


def like(value: Value, mode: FakeTensorMode) -> Value | torch.Tensor:
    """A value of Dynamo's own fake mode in `mode`, that of the backend."""
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )


def copied(
    gm: torch.fx.GraphModule, traced: torch.fx.GraphModule, inputs: Sequence[Argument]
) -> Sequence[Argument]:
    """The traced ops, at the insertion point of `gm`; what they return."""
    env: dict[Node, Argument] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs))
    for n in traced.graph.nodes:
        if n.op == "output":
            return map_arg(n.args[0], env.__getitem__)
        if n.op == "get_attr":
            name = f"_batched_{len(list(gm.buffers()))}_{n.target}"
            gm.register_buffer(name, getattr(traced, str(n.target)))
            env[n] = gm.graph.get_attr(name)
        elif n.op != "placeholder":
            env[n] = gm.graph.node_copy(n, env.__getitem__)
    raise AssertionError("a graph without an output")
