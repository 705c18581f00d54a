"""Marks of what the backward recomputes: on nodes that are traced within, gone afterwards."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from tspc.ops.recompute import recomputed, tag


def marks(group: int, leaves: bool) -> dict[str, object]:
    """Op -> (policy, group) of its node in a trace."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        with recomputed(group, leaves):
            x = x.cos()
        return x.exp()

    with torch.fx.traceback.preserve_node_meta():
        gm = make_fx(fn)(torch.ones(2))
    return {
        n.target._opname: (n.meta.get("recompute"), n.meta.get("ac_graph_id"))
        for n in gm.graph.nodes
        if n.op == "call_function"
    }


@pytest.mark.parametrize(
    "leaves,policy",
    [(False, CheckpointPolicy.PREFER_RECOMPUTE), (True, CheckpointPolicy.MUST_SAVE)],
)
def test_what_is_traced_within_is_marked(leaves: bool, policy: CheckpointPolicy) -> None:
    assert tag(3, leaves) == {"recompute": policy, "ac_graph_id": 3}
    assert marks(3, leaves) == {"sin": (None, None), "cos": (policy, 3), "exp": (None, None)}


def test_no_group_marks_nothing() -> None:
    assert set(marks(0, False).values()) == {(None, None)}
