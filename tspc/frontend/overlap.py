"""What a program is called with: any tensors of the user's, where a compiled program takes plain
ones in the order of their dims; and what it writes into them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.types import IntLikeType as IntLike

from tspc.base.errors import UnsupportedError


def dense(x: Any) -> Any:
    """A tensor with its elements in order, a conjugate or negative one made so; the same object
    where it is so already."""
    if not isinstance(x, torch.Tensor):
        return x
    if x.is_conj() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    return x if x.is_contiguous() else x.contiguous()


def before_writes(writes: Sequence[int], args: Sequence[Any]) -> list[Any]:
    """The arguments of a call; of what it writes at its end a copy, for the backward reads it."""
    return [x.clone() if i in writes else x for i, x in enumerate(args)]


def written(
    writes: Sequence[int], same: Mapping[int, int], args: Sequence[Any], outs: list[Any]
) -> list[Any]:
    """The last outputs are the new values of the inputs `writes`; -> the others.

    same: output -> the written input that it is.
    """
    count = len(outs) - len(writes)
    with torch.no_grad():
        for i, x in zip(writes, outs[count:]):
            if isinstance(args[i], DTensor):  # the value is alike on all ranks
                x = distribute_tensor(
                    x, args[i].device_mesh, args[i].placements, src_data_rank=None
                )
            args[i].copy_(x)
    return [args[same[at]] if at in same else x for at, x in enumerate(outs[:count])]


def overlap(
    writes: Sequence[int], args: Sequence[Any], names: Mapping[int, str]
) -> UnsupportedError | None:
    """What to raise if an input that the model writes into shares memory with another: the program
    reads each as it was when the call began."""
    tensors = [(i, x) for i, x in enumerate(args) if _has_memory(x)] if writes else []
    for w, (i, x) in itertools.product(writes, tensors):
        if i != w and _has_memory(args[w]) and _overlap(args[w], x):
            changed, other = (names.get(k, f"input {k}") for k in (w, i))
            return UnsupportedError(
                f"{changed} shares memory with {other}, and the model writes into it: pass a copy "
                "of one of them"
            )
    return None


def _has_memory(x: Any) -> bool:
    plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided
    return plain and not x.is_meta and x.numel() > 0


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Some element may be of both. Gaps count as elements, but for two tensors that take turns
    along a dim (keys and values in one buffer)."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    (first, last), (start, end) = _span(a), _span(b)
    if last < start or end < first:
        return False
    common = a.stride() if a.stride() == b.stride() and a.dtype == b.dtype else ()
    for k, turn in enumerate(common):
        if turn and all(s % turn == 0 for s in common[:k]):
            inner = [
                sum((n - 1) * s for n, s in zip(x.shape[k + 1 :], common[k + 1 :])) for x in (a, b)
            ]
            gap = (b.storage_offset() - a.storage_offset()) % turn
            if inner[0] < gap and gap + inner[1] < turn:
                return False
    return True


def _span(x: torch.Tensor) -> tuple[IntLike, IntLike]:
    """The first and the last byte of its elements, from the start of its storage."""
    first = x.storage_offset()
    last = first + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    return first * x.element_size(), (last + 1) * x.element_size() - 1
