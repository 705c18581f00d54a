"""Models that another library shards or replicates already: told, with what to do, before the
first graph."""

from __future__ import annotations

import sys
from types import FrameType

import torch.nn as nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tspc.base.errors import PlanError

WRAPPERS = (DistributedDataParallel, FullyShardedDataParallel, DataParallel)
ADVICE = (
    "tspc cuts weights, gradients and optimizer state itself: compile the module without it, and "
    "give all ranks of an axis the same batch; for data-parallel replicas give a mesh of two axes, "
    "options={'mesh': init_device_mesh(device, (R, D), mesh_dim_names=('dp', 'tsp'))}, with "
    "'replicas': 'shard' for what FSDP does"
)


def check_wrapped(root: object) -> None:
    """Called where a compiled module or function is called. Raises `PlanError`."""
    wrapper = _caller() or (_inside(root) if isinstance(root, nn.Module) else "")
    if wrapper:
        raise PlanError(f"backend='tsp' and {wrapper} do not go together: {ADVICE}")


def _caller() -> str:
    """A wrapper whose forward calls this one."""
    codes = {w.forward.__code__: w.__name__ for w in WRAPPERS}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in codes:
            return f"{codes[frame.f_code]} around the compiled module"
        frame = frame.f_back
    return ""


def _inside(root: nn.Module) -> str:
    for name, m in root.named_modules():
        at = f"in {type(root).__name__}" + (f".{name}" if name else "")
        if isinstance(m, WRAPPERS):
            return f"{type(m).__name__} {at}"
        if isinstance(m, FSDPModule):
            return f"fully_shard {at}"
        others = [n for n, p in m._parameters.items() if isinstance(p, DTensor)]
        if others and not hasattr(type(m), "_tspc_class"):
            return f"a parameter that is a DTensor already ({others[0]} {at})"
    return ""
