"""The arguments of a node by the names of its op's schema."""

from __future__ import annotations

from functools import lru_cache

import torch

from tspc.base.context import Keywords
from tspc.ir.program import Node, Ref
from tspc.seams.tensors import OpOverload


@lru_cache(None)
def schema(op: OpOverload) -> tuple[list[tuple[str, object, bool]], bool]:
    """(name, default, is a tensor) of each argument, and whether the op is pointwise."""
    return [
        (a.name, a.default_value if a.has_default_value() else None, "Tensor" in str(a.type))
        for a in op._schema.arguments
    ], torch.Tag.pointwise in op.tags


def bind(node: Node) -> tuple[Keywords, list[Ref | None]]:
    """Arguments by schema name, and the tensor operands in schema order."""
    spec, _ = schema(node.op)
    args = {
        n: node.args[i] if i < len(node.args) else node.kwargs.get(n, d)
        for i, (n, d, _) in enumerate(spec)
    }
    refs: list[Ref | None] = []
    for n, _, tensor in spec:
        v = args[n]
        if not tensor:
            continue
        if isinstance(v, (tuple, list)):
            refs += [r for r in v if r is not None]
        else:
            refs.append(v if isinstance(v, Ref) else None)
    return args, refs
