"""Which parameters have a gradient on one device: what Dynamo's own tracing says, and what of it
the tracing of a graph must not lose."""

from __future__ import annotations

from collections.abc import Collection

import torch

from tspc.seams.compiler import storage_key
from tspc.seams.tensors import FunctionalTensor, OpOverload

ITSELF = (torch.ops.aten.to, torch.ops.aten.contiguous)  # these may give back the operand


def gives_itself(n: torch.fx.Node) -> bool:
    """The result of a traced op is its operand, whose gradient no `no_grad` takes away: tracing
    lets every later use of the one be a use of the other."""
    op, x = n.target, n.args[0] if n.args else None
    if not isinstance(op, OpOverload) or op.overloadpacket not in ITSELF:
        return False
    assert isinstance(x, torch.fx.Node)
    x, y = x.meta["val"], n.meta["val"]
    arguments = zip((a.name for a in op._schema.arguments), n.args)
    copied = {**dict(arguments), **n.kwargs}.get("copy", False)
    same = (x.dtype, x.device, x.stride()) == (y.dtype, y.device, y.stride())
    return same and not copied


def is_input(x: object, inputs: object) -> bool:
    """An output is the very input (`out=`, an in-place op), not another view of its memory."""
    if not (isinstance(x, FunctionalTensor) and isinstance(inputs, FunctionalTensor)):
        return False
    a, b = ((t.shape, t.stride(), t.storage_offset()) for t in (x, inputs))
    return a == b and storage_key(x.elem) == storage_key(inputs.elem)


def reached(gm: torch.fx.GraphModule, outputs: Collection[int]) -> frozenset[int]:
    """The inputs of a Dynamo graph that get a gradient when these outputs do, by the autograd graph
    of Dynamo's fake values.

    None are told where an `autograd.Function` of the model may give none.
    """
    if any("autograd_function_apply" in str(n.target) for n in gm.graph.nodes):
        return frozenset()
    results = gm.graph.output_node().args[0]
    inputs = {
        id(n.meta.get("example_value")): i
        for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))
    }
    wanted = [n for i, n in enumerate(results) if i in outputs and isinstance(n, torch.fx.Node)]  # type: ignore[arg-type]
    values = (n.meta.get("example_value") for n in wanted)
    left = [x.grad_fn for x in values if isinstance(x, torch.Tensor)]
    seen, seen_inputs = set(), set()
    while left:
        step = left.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        seen_inputs.add(inputs.get(id(getattr(step, "variable", None))))
        left += [s for s, _ in step.next_functions]
    return frozenset(i for i in seen_inputs if i is not None)
