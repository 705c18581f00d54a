"""What a rank has done with its parameters since a graph first took them: optimizer steps, changes
in place, gradients that are there. All ranks must have done the same."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from operator import attrgetter, sub

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from tspc.base.state import MODEL, PROCESS, remembered

# steps of optimizers that hold shards, in this process; the foreach and fused ones leave a
# DTensor's version as it was, so versions do not tell them
_STEPS = remembered(PROCESS, [0])
# parameter -> (its version, steps) when it was first taken
_FIRST: MutableMapping[torch.Tensor, tuple[int, int]] = remembered(MODEL, WeakIdKeyDictionary())
_HOOKS: list[object] = remembered(PROCESS, [])
_VERSION, _GRAD = attrgetter("_version"), attrgetter("grad")


def watch() -> None:
    """Count steps from now on."""
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_post_hook(_count))


def _count(optimizer: Optimizer, args: object, kwargs: object) -> None:
    if torch.compiler.is_compiling():
        return
    groups = optimizer.param_groups
    _STEPS[0] += any(isinstance(p, DTensor) for g in groups for p in g["params"][:1])


class Taken:
    """The parameters that one graph takes."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.versions: list[int] = []
        self.steps = 0

    def since(self, params: Sequence[torch.Tensor]) -> list[int]:
        """Optimizer steps, then how often each parameter was changed in place."""
        ids = list(map(id, params))
        if ids != self.ids:
            first = [_FIRST.setdefault(p, (p._version, _STEPS[0])) for p in params]
            self.ids, self.versions = ids, [v for v, _ in first]
            self.steps = first[0][1] if first else _STEPS[0]
        changed = map(sub, map(_VERSION, params), self.versions)
        return [_STEPS[0] - self.steps, *changed]


def steps_since(params: Sequence[torch.Tensor]) -> str:
    """Optimizer steps since a graph first took the first of these, in words."""
    first = _FIRST.get(params[0]) if params else None
    return "unknown" if first is None else str(_STEPS[0] - first[1])


def gradients(params: Sequence[torch.Tensor]) -> list[int]:
    """-1 without a gradient, else how often it was changed in place."""
    return [-1 if g is None else g._version for g in map(_GRAD, params)]
