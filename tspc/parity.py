"""A model on simulated ranks against one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn as nn

from tspc.backend.reference import reference_backend
from tspc.backend.simulated import Simulated, relative_errors, simulated_backend
from tspc.base.errors import ParityError
from tspc.base.options import parse
from tspc.base.usage import (
    check_called,
    check_ranks,
    check_tolerance,
)
from tspc.seams.dynamo import isolated
from tspc.seams.tensors import tree_flatten


@dataclass(frozen=True)
class Verification:
    """What `tspc.verify` returns: how far the ranks were from one device.

    errors: kind ("output", "gradient of", "input gradient", "parameter", "buffer") -> name -> the
    relative error, without unit: |x - x1| / max(|x1|, 1e-3 |X1|) in 2-norms, x1 one device's
    tensor, X1 all of the kind together.
    graphs: the compiled graphs that ran.
    """

    errors: dict[str, dict[str, float]]
    graphs: tuple[Simulated, ...] = field(repr=False)

    @property
    def worst(self) -> float:
        """The largest of the errors, 0.0 where nothing was compared."""
        return max((e for kind in self.errors.values() for e in kind.values()), default=0.0)


def verify(
    model: nn.Module,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    ranks: int = 2,
    options: Mapping[str, object] | None = None,
    tolerance: float = 1e-5,
) -> Verification:
    """Run the model on one device and on `ranks` simulated ranks in this process; compare outputs,
    all gradients, and what the forward wrote into parameters and buffers.

    model: a module with whole parameters; they are left as they were. args, kwargs: of one call.
    options: as in `torch.compile(options=...)`. A scalar output gets the cotangent 1, every other
    differentiable output a fixed random one unless there is a scalar. tolerance: a relative error
    as in `Verification`. Raises `ParityError` naming what differs by more, `OptionError` for a bad
    argument.
    """
    where = "verify(...)"
    check_called(where, model, args, kwargs, module=True)
    check_ranks(where, ranks)
    check_tolerance(where, tolerance)
    graphs: list[Simulated] = []
    compiled = torch.compile(model, backend=simulated_backend(ranks, parse(options), graphs))
    start = {n: x.detach().clone() for n, x in (*model.named_parameters(), *model.named_buffers())}
    state = torch.random.get_rng_state()
    with isolated():
        outcome = _outcome(compiled, model, args, kwargs or {}, start)
    reference: Callable[..., object] = model
    if any(g.rewritten.draws for g in graphs):
        reference = torch.compile(model, backend=reference_backend)
    torch.random.set_rng_state(state)
    with isolated():
        one = _outcome(reference, model, args, kwargs or {}, start)
    errors = {kind: relative_errors(outcome[kind], one[kind]) for kind in one}
    result = Verification(errors, tuple(graphs))
    wrong = {
        f"{kind} {n}": e for kind, es in errors.items() for n, e in es.items() if not e <= tolerance
    }
    if wrong:
        listed = ", ".join(f"{n}: {e:.2e}" for n, e in sorted(wrong.items()))
        raise ParityError(f"{ranks} ranks differ from one device beyond {tolerance}: {listed}")
    return result


def _outcome(
    fn: Callable[..., object],
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    start: Mapping[str, torch.Tensor],
) -> dict[str, dict[str, torch.Tensor]]:
    """Outputs, gradients of parameters and float inputs, and what parameters and buffers are
    then."""
    leaves = [
        x
        for x in tree_flatten((args, kwargs))[0]
        if isinstance(x, torch.Tensor) and x.requires_grad
    ]
    model.zero_grad()
    for x in leaves:
        x.grad = None
    flat = tree_flatten(_plain(fn(*args, **kwargs)))[0]
    outs = [x for x in flat if isinstance(x, torch.Tensor)]
    live = [x for x in outs if x.requires_grad]
    scalars = [x for x in live if not x.dim()]
    generator = torch.Generator().manual_seed(0)
    if scalars:
        torch.autograd.backward(scalars, [torch.ones_like(x) for x in scalars])
    elif live:
        noise = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in live]
        torch.autograd.backward(live, noise)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    input_grads = {str(i): x.grad.clone() for i, x in enumerate(leaves) if x.grad is not None}
    model.zero_grad()
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    after = [{n: x.detach().clone() for n, x in d.items()} for d in (params, buffers)]
    with torch.no_grad():
        for n, x in (*params.items(), *buffers.items()):
            x.copy_(start[n])
    return {
        "output": {str(i): x.detach() for i, x in enumerate(outs)},
        "gradient of": grads,
        "input gradient": input_grads,
        "parameter": after[0],
        "buffer": after[1],
    }


def _plain(out: object) -> object:
    """A model output of a library as a dict of its tensors."""
    return dict(out) if isinstance(out, Mapping) else out
