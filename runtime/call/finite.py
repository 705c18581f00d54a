"""`check_nan`: the first output, parameter or gradient that is not finite, told alike on all ranks.

A scalar output must be finite; any other may hold infinities (masked logits), but no NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tspc.base.errors import NonFiniteError
from tspc.runtime.comm.drivers import distributed
from tspc.runtime.comm.place import Place
from tspc.runtime.comm.requests import AllGather, Request, Steps

Named = Sequence[tuple[str, object]]  # values that are no float tensors are passed over
LISTED = 4
WHAT = "the check for NaN"


def check_outputs(place: Place, outputs: Named, inputs: Named) -> None:
    """inputs: parameters and inputs, searched if an output is wrong. Collective; raises
    `NonFiniteError` on all ranks."""
    wrong = _wrong(place, outputs, True)
    if wrong:
        raise NonFiniteError(f"{_listed(wrong)} after the forward; {_blame(place, inputs)}")


def check_gradients(place: Place, gradients: Named, inputs: Named) -> None:
    """The same after a backward."""
    wrong = _wrong(place, gradients, False)
    if wrong:
        listed = _listed([(f"the gradient of {n}", r) for n, r in wrong])
        raise NonFiniteError(f"{listed} after the backward; {_blame(place, inputs)}")


def _blame(place: Place, inputs: Named) -> str:
    wrong = _wrong(place, inputs, False)
    if wrong:
        return f"already what the call was given is not finite: {_listed(wrong)}"
    return "all parameters and float inputs are finite, so it arises on the way"


def _wrong(place: Place, values: Named, outputs: bool) -> list[tuple[str, list[int]]]:
    """(name, the ranks where it is not finite), in order."""
    if not values:
        return []
    flags = torch.tensor([_is_wrong(x, outputs) for _, x in values], dtype=torch.int8)
    counts = distributed(_gather(flags, "checks"), place.axis, place.groups, WHAT)
    if place.replicas is not None:
        groups = {"activations": place.groups["replica checks"]}
        steps = _gather(counts, "activations")
        counts = distributed(steps, place.replicas, groups, WHAT).amax(0)
    ranks = [r.nonzero().flatten().tolist() for r in counts.T]
    return [(n, r) for (n, _), r in zip(values, ranks) if r]


def _is_wrong(x: object, output: bool) -> bool:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.numel():
        return False
    x = x.detach()
    return bool(x.isnan().any()) if output and x.dim() else not bool(x.isfinite().all())


def _gather(x: torch.Tensor, link: str) -> Steps[torch.Tensor]:
    request: Request = AllGather(x, link)
    handle = yield request
    return handle.wait()


def _listed(wrong: Sequence[tuple[str, list[int]]]) -> str:
    name, ranks = wrong[0]
    more = ", ".join(n for n, _ in wrong[1 : 1 + LISTED])
    others = f" (so are {len(wrong) - 1} more: {more})" if more else ""
    return f"{name} is not finite on ranks {ranks}{others}"
