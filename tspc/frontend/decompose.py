"""Ops that capture takes apart: their parts have rules."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from tspc.seams.compiler import parts_of
from tspc.seams.tensors import OpOverload

LOSSES = """
    mse_loss l1_loss smooth_l1_loss huber_loss kl_div soft_margin_loss poisson_nll_loss
    binary_cross_entropy binary_cross_entropy_with_logits
"""
MOVES = """
    movedim.int movedim.intlist moveaxis.int moveaxis.intlist swapaxes swapdims mT mH adjoint
    narrow tile expand_as view_as reshape_as hstack vstack dstack column_stack concat ravel
    tensor_split.indices unsafe_split.Tensor unsafe_chunk fliplr flipud take_along_dim
    broadcast_tensors atleast_1d.Sequence atleast_2d.Sequence atleast_3d.Sequence
"""
SUMS = """
    inner dot mv addmv addr tensordot linalg_matmul chain_matmul pairwise_distance linalg_norm
    frobenius_norm.dim glu argsort
"""
aten = torch.ops.aten
Tensor = torch.Tensor
Dims = int | list[int] | tuple[int, ...] | None


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Torch's own writes in place."""
    norms = (torch.linalg.vector_norm(x, 2, dim, True).clamp_min(eps) for x in (x1, x2))
    return (x1 / next(norms) * (x2 / next(norms))).sum(dim)


def nll_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
) -> Tensor:
    """The classes are dim 1, or the only one."""
    if x.dim() > 2:
        x = x.permute(0, *range(2, x.dim()), 1)
    kept = target != ignore_index
    safe = torch.where(kept, target, 0)
    loss = -x.gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    count: Tensor = kept
    if weight is not None:
        factor = weight[safe]
        loss, count = loss * factor, torch.where(kept, factor, 0.0)
    loss = torch.where(kept, loss, 0.0)
    if reduction == 0:
        return loss
    return loss.sum() / count.sum() if reduction == 1 else loss.sum()


def var_mean(
    x: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    var = torch.var(x, dim, correction=1 if correction is None else correction, keepdim=keepdim)
    return var, torch.mean(x, dim, keepdim)


def std_mean(
    x: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    std = torch.std(x, dim, correction=1 if correction is None else correction, keepdim=keepdim)
    return std, torch.mean(x, dim, keepdim)


OWN: dict[OpOverload, Callable[..., object]] = {
    aten.cosine_similarity.default: cosine_similarity,
    aten.nll_loss_nd.default: nll_loss,
    aten.var_mean.correction: var_mean,
    aten.std_mean.correction: std_mean,
}


@lru_cache(maxsize=1)
def taken_apart() -> dict[OpOverload, Callable[..., object]]:
    """Op -> what it is made of, as a function."""
    out = dict(OWN)
    for text in " ".join((LOSSES, MOVES, SUMS)).split():
        packet, _, overload = text.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        out[op] = parts_of(op)
    return out
