"""Persistent parameters: a DTensor each under its own name.

`shard_parameters` exchanges a module's parameters in place. `Prologue` turns what is stored into
the equal shards that the folds take, and gradients back. Stored are torch's chunks over the TSP
axis, and then over the replicas, where there are some: whole chunks or, with `cut`, parts of them.
See docs/design.md, "Parameters".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tspc.base.context import Context
from tspc.base.errors import ShardedParameterError, UnsupportedError
from tspc.ir.shard import ShardMap
from tspc.runtime.call.finite import check_gradients
from tspc.runtime.call.twice import refused
from tspc.runtime.comm.drivers import distributed
from tspc.runtime.comm.failures import naming
from tspc.runtime.comm.place import PLACES, Place, chunk_rows
from tspc.runtime.comm.repack import fits, repack, repack_backward
from tspc.runtime.params import libraries, writing
from tspc.runtime.params.accumulate import is_cut, reduced
from tspc.runtime.params.gradients import arrives_cut
from tspc.runtime.params.modules import prepare
from tspc.runtime.params.stored import dim_of, is_stored
from tspc.runtime.params.values import store_on
from tspc.seams.compiler import (
    assign_data_of_shards,
    find_nan_in_shards,
    orthogonalise_whole,
    outside_of_dynamo,
)

EXCHANGE = "the exchange of stored weights for the shards of the folds"


def shard_parameters(
    module: nn.Module,
    mesh: DeviceMesh,
    axis: str,
    dims: Mapping[int, int | None],
    cut: bool = False,
) -> dict[nn.Parameter, nn.Parameter]:
    """Every parameter becomes a DTensor, by rank 0's values (of the first replica); buffers too
    come from rank 0.

    -> old to new. dims: id of a parameter -> the dim to cut, None to replicate; others are cut
    along their largest dim. cut: over the replicas too, as those that are stored so already.
    """
    cut = cut or any(is_cut(p) for p in module.parameters() if isinstance(p, DTensor))
    assign_data_of_shards(is_stored, ShardedParameterError)
    find_nan_in_shards()
    orthogonalise_whole(is_stored)
    store_on(mesh)
    writing.guard()
    libraries.adapt(module)
    prepare([module])
    group = mesh.get_group(0)
    source = dist.get_process_group_ranks(group)[0]
    by_id: dict[int, nn.Parameter] = {}
    exchanged: dict[nn.Parameter, nn.Parameter] = {}
    with torch.no_grad(), naming("the sharding of the parameters", group):
        for m in module.modules():
            for n, p in m._parameters.items():
                if p is None:
                    continue
                m.__dict__["_tspc_axis"] = axis
                if isinstance(p, DTensor):
                    continue
                if id(p) not in by_id:
                    dim = dims[id(p)] if id(p) in dims else default_dim(p)
                    chunk = Replicate() if dim is None else Shard(dim)
                    placements = [chunk, chunk if cut else Replicate()][: mesh.ndim]
                    rank = None if p.is_meta else 0
                    data = distribute_tensor(p.data, mesh, placements, src_data_rank=rank)
                    by_id[id(p)] = nn.Parameter(data, requires_grad=p.requires_grad)
                    arrives_cut(by_id[id(p)])
                    exchanged[p] = by_id[id(p)]
                m._parameters[n] = by_id[id(p)]
        for b in (b for b in module.buffers() if not b.is_meta):
            b.copy_(PLACES[axis].from_first_replica(b))
            dist.broadcast(b, source, group=group)
    return exchanged


def default_dim(p: torch.Tensor) -> int | None:
    """The largest dim; parameters of one dim below 64 KiB are replicated."""
    if p.dim() == 0 or (p.dim() == 1 and p.numel() * p.element_size() < 64 * 1024):
        return None
    return max(range(p.dim()), key=lambda k: p.shape[k])


def placed(m: ShardMap | None) -> Placement:
    """How a parameter is stored for a shard map."""
    return Replicate() if m is None else Shard(m.dim)


def _exchanged(
    x: torch.Tensor, p: DTensor, placement: Placement, wanted: Placement, mesh: DeviceMesh
) -> torch.Tensor:
    """Collective, unless the chunk is cut as wanted already."""
    if placement == wanted:
        return x
    facts = {"run_check": False, "shape": p.shape, "stride": p.stride()}
    chunk = DTensor.from_local(x, mesh, [placement], **facts)
    return chunk.redistribute(placements=[wanted]).to_local()


def _chunks(place: Place, params: Sequence[DTensor]) -> list[torch.Tensor]:
    """This rank's chunks, whole: gathered over the replicas where they are cut."""
    out = [p._local_tensor for p in params]
    cut = [i for i, p in enumerate(params) if is_cut(p)]
    dims = [dim_of(params[i].placements[0]) for i in cut]
    sizes = [chunk_rows(place.axis, params[i].shape[d]) for i, d in zip(cut, dims)]
    for i, x in zip(cut, place.gather([out[i] for i in cut], dims, sizes)):
        out[i] = x
    return out


@dataclass(frozen=True)
class Taken:
    """How one graph takes its sharded parameters.

    names: of the parameters. reduce: the type in which gradients add up. check: their gradients
    are to be finite (`check_nan`). due: the names of those that must have one. program: what they
    are taken for.
    """

    place: Place
    names: Sequence[str]
    maps: Sequence[ShardMap | None]
    reduce: torch.dtype | None = None
    check: bool = False
    due: frozenset[str] = frozenset()
    program: object = None  # a backward that outlives the model still finds the bodies of its folds

    @cached_property
    def wanted(self) -> list[Placement]:
        """How each is stored where nothing has to be exchanged."""
        return [placed(m) for m in self.maps]


class Prologue(torch.autograd.Function):
    """What is stored of all parameters -> the tensors that one rank's program takes; gradients go
    back as DTensors, their means over the replicas.

    A parameter stored otherwise than the program's map wants is exchanged, either way.
    """

    @staticmethod
    def forward(ctx: Context, taken: Taken, *params: DTensor) -> object:
        place = taken.place
        ctx.rest, ctx.shapes, outs = (taken, params), [], []
        ctx.set_materialize_grads(False)
        chunks = _chunks(place, params)
        for p, m, wanted, x in zip(params, taken.maps, taken.wanted, chunks):
            spec = p._spec
            x = _exchanged(x, p, spec.placements[0], wanted, place.mesh)
            ctx.shapes.append(x.shape)
            if m is None or fits(m, x.shape, spec.shape):
                outs.append(x.view_as(x))
            else:
                steps = repack(place.axis, m, x, spec.shape[m.dim])
                outs.append(distributed(steps, place.axis, place.groups, EXCHANGE))
        return tuple(outs)

    @staticmethod
    @outside_of_dynamo
    def backward(ctx: Context, *grads: torch.Tensor) -> object:
        with torch.no_grad():
            out = Prologue.returned(ctx, grads)
        return (None, *refused(out))

    @staticmethod
    def returned(ctx: Context, grads: Sequence[torch.Tensor | None]) -> list[DTensor | None]:
        """Gradients of what a program took -> those of what is stored."""
        taken, params = ctx.rest
        place, chunks = taken.place, []
        lost = [n for n, g in zip(taken.names, grads) if g is None and n in taken.due]
        if lost:
            raise UnsupportedError(
                f"{', '.join(lost)}: has a gradient on one device, none in the compiled program, "
                "an error of tspc; take what computes with it out by torch._dynamo.disable"
            )
        for g, m, p, wanted, shape in zip(grads, taken.maps, params, taken.wanted, ctx.shapes):
            spec = p._spec
            if g is not None:
                if m is not None and not fits(m, shape, spec.shape):
                    steps = repack_backward(place.axis, m, g, spec.shape[m.dim], shape[m.dim])
                    g = distributed(steps, place.axis, place.groups, EXCHANGE)
                g = _exchanged(g, p, wanted, spec.placements[0], place.mesh)
            chunks.append(g)
        out = reduced(place, params, taken.names, chunks, taken.reduce)
        if taken.check:
            local_grads = [
                (n, None if g is None else g._local_tensor) for n, g in zip(taken.names, out)
            ]
            check_gradients(
                place, local_grads, [(n, p._local_tensor) for n, p in zip(taken.names, params)]
            )
        return out
