"""Parts of a model that Dynamo keeps apart become ops of the one graph.

In: a Dynamo graph with `tag_activation_checkpoint` and `invoke_subgraph` nodes. Out: an equal graph
with their bodies in their place; each op of a checkpoint says in its meta to which part it belongs,
and that the backward recomputes it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch

from tspc.base.journal import log
from tspc.ops.recompute import tag

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
# what calls a body -> how many of its arguments are not the body's
CALLS = {CHECKPOINT: 1, torch.ops.higher_order.invoke_subgraph: 2}


def inlined(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`gm` itself where nothing of it is apart."""
    if not any(n.target in CALLS for n in gm.graph.nodes):
        return gm
    graph = torch.fx.Graph()
    graph.output(_copied(gm, "", graph, {}, itertools.count(1), 0))
    out = torch.fx.GraphModule(gm, graph)
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None:
        object.__setattr__(out, "compile_subgraph_reason", reason)
    return out


def _copied(
    gm: torch.fx.GraphModule,
    path: str,
    graph: torch.fx.Graph,
    env: dict[torch.fx.Node, Any],
    groups: Iterator[int],
    group: int,
) -> Any:
    """Copies the nodes that `env` does not have yet, in their group (0: none) -> the outputs."""

    def load(a: Any) -> Any:
        return torch.fx.map_arg(a, lambda n: env[n])

    for n in gm.graph.nodes:
        if n.op == "output":
            return load(n.args[0])
        if n in env or (n.op == "get_attr" and _is_body(gm, n)):
            continue
        if n.target in CALLS:
            body = getattr(gm, n.args[0].target)
            if "_checkpoint_context_fn" in body.meta:
                log.warning(
                    "a checkpoint's context_fn (what to save of it) is ignored: all of it is made "
                    "again in the backward"
                )
            inputs = dict(
                zip(body.graph.find_nodes(op="placeholder"), load(n.args[CALLS[n.target] :]))
            )
            inner = f"{path}{n.args[0].target}."
            inner_group = next(groups) if n.target is CHECKPOINT and not group else group
            env[n] = _copied(body, inner, graph, inputs, groups, inner_group)
        elif n.target is operator.getitem and isinstance(env[n.args[0]], (tuple, list)):
            env[n] = env[n.args[0]][n.args[1]]
        else:
            env[n] = copy = graph.node_copy(n, lambda x: env[x])
            if copy.op == "get_attr":
                copy.target = f"{path}{n.target}"
            if group:
                copy.meta.update(tag(group))
    raise AssertionError("a graph without output")


def _is_body(gm: torch.fx.GraphModule, n: torch.fx.Node) -> bool:
    return all(u.target in CALLS for u in n.users) and isinstance(
        getattr(gm, str(n.target), None), torch.fx.GraphModule
    )
