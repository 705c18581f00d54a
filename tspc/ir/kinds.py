"""Kinds of ops and of nodes that more than one stage asks for."""

from __future__ import annotations

import torch

from tspc.seams.tensors import OpOverload

aten = torch.ops.aten

# kinds of the nodes that `propagate` inserts
LOCAL, WHOLE, ALL_REDUCE, VARY, CLEAR = "local", "whole", "all_reduce", "vary", "clear_pads"
GATHER_WEIGHT, EMBED, ATTENTION = "gather_weight", "embed", "attention"
CONVERSIONS = (LOCAL, WHOLE, ALL_REDUCE, VARY, CLEAR, GATHER_WEIGHT, EMBED, ATTENTION)
PADS = (aten.pad.default, aten.constant_pad_nd.default)
SUMS = (aten.sum.dim_IntList, aten.sum.default)
MEANS = (aten.mean.dim, aten.mean.default)
CONTRACTIONS = (
    aten.linear.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten.einsum.default,
)
# role -> the ops along the sequence that may have it, run by `passes.lower.sequence_ops`
ALONG: dict[str, set[OpOverload]] = {
    "halo": {*PADS, aten.flip.default, aten.roll.default},
    "scan": {aten.cumsum.default},
}
