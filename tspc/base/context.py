"""The types of what torch hands on without one: the context of an autograd function, and the
arguments of an op in a dispatch."""

from __future__ import annotations

from typing import Any, Protocol

import torch

Arguments = tuple[Any, ...]  # of an op: tensors, numbers, lists of them, ...
Keywords = dict[str, Any]


class Context(Protocol):
    """What `forward` leaves for `backward`, under names of its own."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[torch.Tensor, ...]: ...

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...

    def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: object) -> None: ...
