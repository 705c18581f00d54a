"""Marks of what the backward recomputes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.fx.traceback import preserve_node_meta, set_current_meta
from torch.utils.checkpoint import CheckpointPolicy

from tspc.base.context import Keywords


def tag(group: int, leaves: bool = False) -> Keywords:
    policy = CheckpointPolicy.MUST_SAVE if leaves else CheckpointPolicy.PREFER_RECOMPUTE
    return {"recompute": policy, "ac_graph_id": group}


@contextmanager
def recomputed(group: int, leaves: bool) -> Iterator[None]:
    """What is traced here is recomputed in the backward, from what enters its group (0: none).

    leaves: what it makes is read outside of the group, and kept if the backward reads it.
    """
    if not group:
        yield
        return
    marked = torch.fx.Graph().placeholder("tag")
    marked.meta = tag(group, leaves)
    with preserve_node_meta(), set_current_meta(marked):
        yield
