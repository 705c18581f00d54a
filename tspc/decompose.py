"""Ops that capture takes apart: their parts have rules."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from tspc.torch_seams import parts_of

LOSSES = """
    mse_loss l1_loss smooth_l1_loss huber_loss kl_div soft_margin_loss poisson_nll_loss
    binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss
    hinge_embedding_loss margin_ranking_loss nll_loss_nd
"""
MOVES = """
    movedim.int movedim.intlist moveaxis.int moveaxis.intlist swapaxes swapdims mT mH adjoint
    narrow tile expand_as view_as reshape_as hstack vstack dstack column_stack concat ravel
    tensor_split.indices unsafe_split.Tensor unsafe_chunk fliplr flipud take_along_dim
"""
SUMS = """
    inner dot mv addmv addr tensordot linalg_matmul chain_matmul cosine_similarity
    pairwise_distance linalg_norm frobenius_norm.dim std_mean.correction var_mean.correction
    glu argsort
"""


@lru_cache(maxsize=1)
def taken_apart() -> dict[Any, Callable[..., Any]]:
    """Op -> what it is made of, as a function."""
    out = {}
    for text in " ".join((LOSSES, MOVES, SUMS)).split():
        packet, _, overload = text.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        out[op] = parts_of(op)
    return out
