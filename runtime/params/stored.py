"""What is stored in parts, as a whole: gathered, cut, written back; partial results of all ranks.

A *stored* tensor is a DTensor on a mesh that tspc stores parameters on. All of it is collective
but the cutting.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from tspc.base.state import PROCESS, remembered
from tspc.runtime.comm.failures import naming
from tspc.seams.tensors import DTensorSpec, TensorMeta

Value = TypeVar("Value")
WHAT = "a value of sharded parameters outside of the compiled graphs"
NOTED = 2**20  # bytes; what is smaller is gathered without a word
_LOG = logging.getLogger("tspc")
_MESHES: set[DeviceMesh] = remembered(PROCESS, set())
_SEEN: dict[int, DeviceMesh] = remembered(PROCESS, {})  # the same, by identity
_TOLD: set[str] = remembered(PROCESS, set())


def claim(mesh: DeviceMesh) -> None:
    """Parameters are stored on it."""
    _MESHES.add(mesh)


def is_stored(x: object) -> TypeGuard[DTensor]:
    return isinstance(x, DTensor) and is_ours(x._spec.mesh)


def is_ours(mesh: DeviceMesh) -> bool:
    if id(mesh) in _SEEN:
        return True
    if mesh in _MESHES:
        _SEEN[id(mesh)] = mesh
        return True
    return False


def is_cut(x: DTensor) -> bool:
    return any(p.is_shard() for p in x._spec.placements)


def cuts(spec: DTensorSpec) -> list[tuple[int, int]]:
    """(mesh dim, tensor dim) of each cut, in the order in which they are made."""
    return [(k, p.dim) for k, p in enumerate(spec.placements) if isinstance(p, Shard)]


def dim_of(placement: Placement) -> int:
    """The dim that it cuts."""
    assert isinstance(placement, Shard), placement
    return placement.dim


def chunk(x: torch.Tensor, spec: DTensorSpec) -> torch.Tensor:
    """This rank's part of a whole tensor that broadcasts to the shape of `spec`: a view."""
    missing = len(spec.shape) - x.dim()
    for k, d in cuts(spec):
        at = d - missing
        if at < 0 or (x.shape[at] == 1 and spec.shape[d] != 1):
            continue
        start, rows = _rows(x.shape[at], spec.mesh.size(k), spec.mesh.get_local_rank(k))
        x = x.narrow(at, start, rows)
    return x


def _rows(size: int, ranks: int, rank: int) -> tuple[int, int]:
    each = -(-size // ranks)
    start = min(rank * each, size)
    return start, min(each, size - start)


def holds_rows(spec: DTensorSpec, ranks: Sequence[int]) -> bool:
    """Whether the rank at this place of the mesh has a part that is not empty."""
    sizes = list(spec.shape)
    for k, d in cuts(spec):
        _, sizes[d] = _rows(sizes[d], spec.mesh.size(k), ranks[k])
    return all(sizes[d] for _, d in cuts(spec))


def whole(x: Value, why: str = "") -> Value | torch.Tensor:
    """A stored tensor on every rank; anything else as it is. why: what needs it, told once."""
    if not is_stored(x):
        return x
    if not any(p.is_shard() or p.is_partial() for p in x._spec.placements):
        return x._local_tensor
    if why and x.nbytes >= NOTED and why not in _TOLD:
        _TOLD.add(why)
        _LOG.warning(
            "tspc: %s outside of the compiled graphs needs a sharded tensor %s whole on every "
            "rank: %.1f MiB are gathered each time",
            *(why, list(x.shape), x.nbytes / 2**20),
        )
    with torch.no_grad(), naming(WHAT, x._spec.mesh.get_group(0)):
        return DTensor(x._local_tensor.detach(), x._spec, requires_grad=False).full_tensor()


def put(x: DTensor, value: torch.Tensor) -> None:
    """Write a whole value into what is stored."""
    x._local_tensor.copy_(chunk(value, x._spec))


def wrap(
    local: torch.Tensor,
    like: DTensorSpec,
    placements: Sequence[Placement] | None = None,
    shape: Sequence[int] | None = None,
) -> DTensor:
    """A part as a stored tensor. shape: the whole one, default that of `like`."""
    meta = like.tensor_meta
    assert meta is not None
    same = placements is None and shape is None and local.dtype == meta.dtype
    if same and local.is_contiguous() and meta.stride == _contiguous(meta.shape):
        return DTensor(local, like, requires_grad=False)
    shape = torch.Size(meta.shape if shape is None else shape)
    stride = meta.stride
    if local.is_contiguous() or len(stride) != len(shape):
        stride = _contiguous(shape)
    meta = TensorMeta(shape, stride, local.dtype)
    spec = DTensorSpec(like.mesh, tuple(placements or like.placements), tensor_meta=meta)
    return DTensor(local, spec, requires_grad=False)


@functools.lru_cache(1024)
def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    out, step = [], 1
    for n in reversed(shape):
        out.append(step)
        step *= max(n, 1)
    return tuple(reversed(out))


def parts(x: torch.Tensor, spec: DTensorSpec, everyone: bool = False) -> torch.Tensor:
    """A tensor of one shape on each rank -> those of the ranks that hold rows (or of everyone),
    stacked: alike, in one order, on all ranks."""
    mesh, places = spec.mesh, [[0] * spec.mesh.ndim]
    out = x.contiguous()[None]
    if x.dtype == torch.bool:
        out = out.view(torch.uint8)
    for k, _ in reversed(cuts(spec)):
        blocks = [torch.empty_like(out) for _ in range(mesh.size(k))]
        with torch.no_grad(), naming(WHAT, mesh.get_group(k)):
            dist.all_gather(blocks, out, group=mesh.get_group(k))
        out = torch.cat(blocks)
        places = [[*p[:k], r, *p[k + 1 :]] for r in range(mesh.size(k)) for p in places]
    kept = [i for i, p in enumerate(places) if everyone or holds_rows(spec, p)]
    out = out[kept] if len(kept) < len(places) else out
    return out.view(torch.bool) if x.dtype == torch.bool else out
