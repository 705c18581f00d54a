"""Whether what was chosen goes with the ranks, and the model is the one that was planned: the same
parameters, with their shapes and types."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn as nn

from tspc.base.errors import OptionError, PlanError
from tspc.base.options import Options
from tspc.runtime.comm.place import Place
from tspc.seams.compiler import compiled_roots

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


def check_chosen(chosen: Options, mode: str | None, place: Place, gm: torch.fx.GraphModule) -> None:
    """What does not go with more than one rank, or with this model, is an error."""
    if mode is not None:
        raise OptionError(
            f"mode={mode!r} is Inductor's and works on one rank only; on {place.axis.size} ranks "
            "leave it out (tspc's own options: options={...})"
        )
    if chosen.plan is not None and chosen.plan.ranks != place.axis.size:
        raise PlanError(
            f"the plan is for {chosen.plan.ranks} ranks, the axis has {place.axis.size}: plan again"
        )
    if chosen.plan is not None:
        for root in compiled_roots(gm)[:1]:
            check_planned("options", chosen.plan.parameters, root)
