"""What the host has to know of masks and data, read once for each batch: on a device it waits for
that, and for nothing else in a step."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from tspc.base.state import CALL, MODEL, remembered
from tspc.seams.tensors import FakeTensor

Tensor = torch.Tensor
Fact = TypeVar("Fact")
Known = tuple[list[int], list[TensorWeakRef], dict[Hashable, object]]
# first tensor -> (versions of all that facts are of, these tensors, the facts by key)
_KNOWN: MutableMapping[Tensor, Known] = remembered(MODEL, WeakIdKeyDictionary())
# of a run without values: what each wait is for, and where
WAITS: list[str] = remembered(CALL, [])
KERNELS: list[str] = remembered(CALL, [])  # of such a run, as blocks take them


def fact(key: Hashable, tensors: Sequence[Tensor], read: Callable[[], Fact], unknown: Fact) -> Fact:
    """A fact of tensors: read where their contents changed since it was.

    unknown: the answer for tensors without values.
    """
    first = tensors[0]
    if any(x.is_inference() for x in tensors):  # nothing tells that one was written to
        return unknown if isinstance(first, FakeTensor) else read()
    versions = [x._version for x in tensors]
    entry = _KNOWN.get(first)
    if entry is None or entry[0] != versions or not _are(entry[1], tensors):
        entry = _KNOWN[first] = versions, [TensorWeakRef(x) for x in tensors], {}
    facts = entry[2]
    if key not in facts:
        if isinstance(first, FakeTensor):
            _waits(first, "what a mask or data holds, once a batch")
            facts[key] = unknown
        else:
            facts[key] = read()
    answer: Any = facts[key]
    return answer


def _are(refs: Sequence[TensorWeakRef], tensors: Sequence[Tensor]) -> bool:
    return len(refs) == len(tensors) and all(r() is x for r, x in zip(refs, tensors))


def noted() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(kernels, waits) of the last run without values, each once. They are forgotten."""
    out = tuple(dict.fromkeys(KERNELS)), tuple(dict.fromkeys(WAITS))
    KERNELS.clear()
    WAITS.clear()
    return out


def _waits(x: Tensor, what: str) -> None:
    """The host, for a device, in a run without values."""
    if x.device.type != "cpu":
        frame = traceback.extract_stack(limit=3)[0]
        WAITS.append(f"{what} ({frame.name})")
