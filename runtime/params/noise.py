"""Random numbers drawn for stored tensors: those that one device draws, from the generator of the
mesh's first rank, whole on every rank and then cut. A generator that stands where the first rank's
does goes on with it, so that plain numbers drawn next are alike too; any other stays as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tspc.runtime.comm.failures import naming
from tspc.seams.tensors import OpOverload

WHAT = "the seed of random numbers for sharded parameters outside of the compiled graphs"
_VALUES = ("bernoulli", "native_dropout", "rrelu", "multinomial", "binomial", "poisson")


def ignores_values(op: OpOverload) -> bool:
    """It only looks at the shape and type of its tensor."""
    name = op._schema.name.removeprefix("aten::")
    if name in ("bernoulli_", "bernoulli.p"):
        return True
    return name.endswith(("_like", "_")) and not name.startswith(_VALUES)


@contextlib.contextmanager
def of_first_rank(mesh: DeviceMesh, generator: torch.Generator | None) -> Iterator[None]:
    """Inside, the default generator is the first rank's. A generator given is used as it is."""
    if generator is not None:
        yield
        return
    of: ModuleType = torch.cuda if mesh.device_type == "cuda" else torch.random
    state_here = of.get_rng_state()
    state = state_here.to(mesh.device_type, copy=True)
    for k in range(mesh.ndim):
        group = mesh.get_group(k)
        with naming(WHAT, group):
            dist.broadcast(state, dist.get_global_rank(group, 0), group)
    alike = torch.equal(state.cpu(), state_here)
    of.set_rng_state(state.cpu())
    try:
        yield
    finally:
        if not alike:
            of.set_rng_state(state_here)
