"""Where in the model something comes from: the innermost frame of the model's own code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tspc.ir.source import OURS, graph_break, source_line

USERS = '  File "/home/me/model.py", line 7, in forward\n'
INNER = '  File "/lib/site-packages/library/blocks.py", line 9, in forward\n'
TORCH = '  File "/lib/site-packages/torch/nn/functional.py", line 3, in linear\n'
PRODUCT = f'  File "{OURS}/api.py", line 1, in plan\n'
HOOK = '  File "/home/me/modes.py", line 2, in __torch_function__\n'


@pytest.mark.parametrize(
    "trace,line",
    [
        (USERS + TORCH, "model.py:7"),
        (USERS + INNER + TORCH, "library/blocks.py:9"),
        (USERS + PRODUCT + HOOK, "model.py:7"),
        (TORCH, ""),
        (None, ""),
    ],
)
def test_the_innermost_frame_of_the_model(trace: str | None, line: str) -> None:
    node = torch.fx.Graph().placeholder("x")
    node.meta["stack_trace"] = trace
    assert source_line(node) == line


def ends_with(reason: object) -> torch.fx.GraphModule:
    gm = torch.fx.GraphModule({}, torch.fx.Graph())
    gm.compile_subgraph_reason = reason
    return gm


def test_the_graph_break_that_ends_a_graph() -> None:
    frames = [SimpleNamespace(filename="/a/b.py", lineno=3)]
    broken = SimpleNamespace(graph_break=True, user_stack=frames)
    assert graph_break(ends_with(broken)) == "b.py:3"
    assert graph_break(ends_with(SimpleNamespace(graph_break=True, user_stack=[]))) != ""
    assert graph_break(ends_with(SimpleNamespace(graph_break=False, user_stack=frames))) == ""
    assert graph_break(ends_with(None)) == ""
