"""D ranks in one process: the partitioned graphs of one rank interpreted for all ranks in
lockstep.

Every aten op runs once per rank; every op of tspc runs as D generators that must issue the same
communications.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.node import Argument

from tspc.base.context import Arguments, Keywords
from tspc.runtime.comm.drivers import lockstep
from tspc.runtime.comm.requests import Axis
from tspc.runtime.execute import GENERATORS
from tspc.seams.tensors import OpOverload, tree_leaves

# some kernels give other strides than their fakes
RESHAPED: dict[object, Callable[..., object]] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default
}


def run(
    graph: torch.fx.GraphModule, axis: str, inputs: Sequence[Sequence[object]]
) -> list[list[Any]]:
    """Run a graph on all ranks in one process; inputs of each rank, in placeholder order -> outputs
    of each rank."""
    ranks = len(inputs)
    env: list[dict[torch.fx.Node, Any]] = [{} for _ in range(ranks)]
    uses = {n: len(n.users) for n in graph.graph.nodes}
    streams = [iter(x) for x in inputs]
    for n in graph.graph.nodes:
        if n.op == "placeholder":
            values = [next(g) for g in streams]
        elif n.op == "get_attr":
            values = [getattr(graph, n.target)] * ranks
        elif n.op == "output":
            return [list(arguments(n.args[0], e)) for e in env]
        else:
            args = [arguments(n.args, e) for e in env]
            kwargs = [arguments(n.kwargs, e) for e in env]
            if getattr(n.target, "namespace", "") == "tspc":
                values = _together(n.target, axis, args, kwargs)
            else:
                target = RESHAPED.get(n.target) or n.target
                values = [target(*a, **k) for a, k in zip(args, kwargs)]
        for e, v in zip(env, values):
            e[n] = v
        for used in n.all_input_nodes:
            uses[used] -= 1
            if not uses[used]:
                for e in env:
                    del e[used]
    raise AssertionError("a graph without output")


def arguments(a: Argument, env: dict[torch.fx.Node, Any]) -> Any:
    """With the values of nodes in their places."""
    return torch.fx.map_arg(a, lambda n: env[n])


def _together(
    op: OpOverload, axis: str, args: list[Arguments], kwargs: list[Keywords]
) -> list[torch.Tensor]:
    names = [a.name for a in op._schema.arguments]
    fn = GENERATORS[op._schema.name.split("::")[1]]
    steps = []
    for r, (a, k) in enumerate(zip(args, kwargs)):
        full = [*a, *(k[n] for n in names[len(a) :])]
        steps.append(fn(Axis(axis, len(args), r), *full))
    values = lockstep(steps)
    for x in tree_leaves(values):  # Inductor counts on the strides of the fakes
        assert x.is_contiguous(), f"{op} gives strides {x.stride()} for {tuple(x.shape)}"
    return values
