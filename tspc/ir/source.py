"""Where in the model something comes from, as "file:line"."""

from __future__ import annotations

import re
from pathlib import Path

import torch

OURS = str(Path(__file__).parents[1])


def source_line(node: torch.fx.Node) -> str:
    """ "file:line" of the innermost frame of the model's own code."""
    trace = node.meta.get("stack_trace") or ""
    frames = [
        (file, line)
        for file, line, function in re.findall(r'File "([^"]+)", line (\d+), in (\S+)', trace)
        if "/torch/" not in file and not file.startswith(OURS) and function != "__torch_function__"
    ]
    if not frames:
        return ""
    file, line = frames[-1]
    package = file.split("site-packages/")
    file = package[1] if len(package) > 1 else file.rsplit("/", 1)[-1]
    return f"{file}:{line}"


def graph_break(gm: torch.fx.GraphModule) -> str:
    """file:line of the graph break that ends a Dynamo graph, "" if none does."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    at = reason.user_stack[-1] if reason.user_stack else None
    return "a graph break" if at is None else f"{Path(at.filename).name}:{at.lineno}"
