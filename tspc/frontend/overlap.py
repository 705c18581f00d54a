"""What a program is called with: any tensors of the user's, where a compiled program takes plain
ones in the order of their dims; and what it writes into them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeGuard, TypeVar

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.types import IntLikeType as IntLike

from tspc.base.errors import UnsupportedError

Value = TypeVar("Value")


def dense(x: Value) -> Value | torch.Tensor:
    """A tensor with its elements in order, a conjugate or negative one made so; the same object
    where it is so already."""
    if not isinstance(x, torch.Tensor):
        return x
    plain: torch.Tensor = x
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    return plain if plain.is_contiguous() else plain.contiguous()


def before_writes(writes: Sequence[int], args: Sequence[Value]) -> list[Value | torch.Tensor]:
    """The arguments of a call; of what it writes at its end a copy, for the backward reads it."""
    return [
        x.clone() if i in writes and isinstance(x, torch.Tensor) else x for i, x in enumerate(args)
    ]


def written(
    writes: Sequence[int], same: Mapping[int, int], args: Sequence[object], outs: Sequence[object]
) -> list[object]:
    """The last outputs are the new values of the inputs `writes`; -> the others.

    same: output -> the written input that it is.
    """
    count = len(outs) - len(writes)
    with torch.no_grad():
        for i, x in zip(writes, outs[count:]):
            into = args[i]
            assert isinstance(into, torch.Tensor) and isinstance(x, torch.Tensor)
            if isinstance(into, DTensor):  # the value is alike on all ranks
                x = distribute_tensor(x, into.device_mesh, into.placements, src_data_rank=None)
            into.copy_(x)
    return [args[same[at]] if at in same else x for at, x in enumerate(outs[:count])]


def overlap(
    writes: Sequence[int], args: Sequence[object], names: Mapping[int, str]
) -> UnsupportedError | None:
    """What to raise if an input that the model writes into shares memory with another: the program
    reads each as it was when the call began."""
    tensors = [(i, x) for i, x in enumerate(args) if _has_memory(x)] if writes else []
    for w, (i, x) in itertools.product(writes, tensors):
        into = args[w]
        if i != w and _has_memory(into) and _overlap(into, x):
            changed, other = (names.get(k, f"input {k}") for k in (w, i))
            return UnsupportedError(
                f"{changed} shares memory with {other}, and the model writes into it: pass a copy "
                "of one of them"
            )
    return None


def _has_memory(x: object) -> TypeGuard[torch.Tensor]:
    if not isinstance(x, torch.Tensor) or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return x.layout == torch.strided and not x.is_meta and x.numel() > 0


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
