"""What a Dynamo graph holds that capture would read wrongly or not at all: an error with its place,
before anything is traced."""

from __future__ import annotations

import torch

from tspc.base.errors import UnsupportedError
from tspc.ir.source import source_line

WHY = {
    "register_hook": "a hook on a gradient; take it out of the compiled model, or multiply in the "
    "forward",
    "cond": "torch.cond; choose by torch.where, or outside of the compiled model",
    "while_loop": "a while_loop; write the steps out, or move it out of the compiled model",
    "_grad_increment_nesting": "torch.func's grad or vjp inside the model; call it around the "
    "compiled model, or write the derivative out",
    "_jvp_increment_nesting": "torch.func's jvp inside the model; write the derivative out",
}


def check(gm: torch.fx.GraphModule) -> None:
    """Raises `UnsupportedError`."""
    for module in gm.modules():
        nodes = list(module.graph.nodes) if isinstance(module, torch.fx.GraphModule) else []
        for i, n in enumerate(nodes):
            name = getattr(n.target, "__name__", str(n.target)).rpartition(".")[2]
            if n.op != "call_function" or name not in WHY:
                continue
            where = next(filter(None, map(source_line, nodes[i:])), n.name)
            raise UnsupportedError(f"{where}: {WHY[name]}")
