"""Whether a model is the one that was planned: the same parameters, with their shapes and
types."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn as nn

from tspc.base.errors import PlanError

LISTED = 3  # parameters that a message names


def parameters_of(module: nn.Module) -> dict[str, str]:
    """Name -> "float32[64, 16]", of every parameter."""
    named = module.named_parameters(remove_duplicate=False)
    return {
        n.replace("_orig_mod.", ""): f"{str(p.dtype).removeprefix('torch.')}{list(p.shape)}"
        for n, p in named
    }


def check_planned(where: str, planned: Mapping[str, str], module: nn.Module) -> None:
    """planned: as `parameters_of`, of the module that was planned; empty for a function.

    Raises `PlanError` if neither the module nor a part of it is that one.
    """
    if not planned:
        return
    here = parameters_of(module)
    if here == planned or any(parameters_of(m) == planned for m in module.children()):
        return
    wrong = [n for n in (*planned, *(n for n in here if n not in planned))]
    wrong = [n for n in wrong if planned.get(n) != here.get(n)]
    unlike = [
        f"{n} is {here.get(n, 'not there')}, {planned.get(n, 'not there')} in the plan"
        for n in wrong[:LISTED]
    ]
    more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
    raise PlanError(
        f"{where}: the plan is of another model than {type(module).__name__}: {'; '.join(unlike)}"
        f"{more}: plan this model"
    )
