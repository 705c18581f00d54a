"""Graphs that hold no part of a model: clipping, an optimizer's step or an average inside of a
compiled function. They run as they are, op by op on the shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor


def only_shards(gm: torch.fx.GraphModule, example_inputs: Sequence[object]) -> bool:
    """Whether a graph takes shards, and none of them as the weight of a module."""
    if not any(isinstance(x, DTensor) for x in example_inputs):
        return False
    target = getattr(torch.ops.tspc, "whole_weight", None)
    return not any(n.target in (target, getattr(target, "default", None)) for n in gm.graph.nodes)
