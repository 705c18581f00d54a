"""Initialise a sharded model as one device would.

In: a model whose parameters are shards without values. The model's own initialiser, or its
constructor run again, works on whole parameters; the memory of one is there only while an op
reads or writes it, then every rank keeps its chunk. All ranks draw from rank 0's generator.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from tspc.base.context import Arguments, Keywords
from tspc.base.errors import PlanError
from tspc.runtime.comm import exchange
from tspc.runtime.comm.drivers import distributed
from tspc.runtime.comm.place import Place
from tspc.seams.compiler import storage_key
from tspc.seams.tensors import OpOverload, TorchDispatchMode, tree_leaves

RESETS = ("reset_parameters", "_reset_parameters")  # nn.MultiheadAttention has the second


@dataclass
class _Kept:
    """A tensor whose memory comes and goes; chunk: this rank's part of it while it is gone."""

    tensor: torch.Tensor  # flat, over the whole storage
    stays: bool
    chunk: torch.Tensor | None = None
    resident: bool = True
    written: str | None = None


class Wholes(TorchDispatchMode):
    """While on, the memory of a kept tensor is there only for the ops that touch it.

    by: who writes now; a tensor written by two raises `PlanError`.
    """

    def __init__(self, place: Place):
        super().__init__()
        self.place, self.by = place, ""
        self.kept: dict[int, _Kept] = {}

    def keep(self, t: torch.Tensor, stays: bool = False) -> None:
        """stays: only watch what is written."""
        key = storage_key(t)
        if key not in self.kept:
            storage = t.untyped_storage()
            count = storage.nbytes() // t.element_size()
            flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, 0, (count,), (1,))
            self.kept[key] = _Kept(flat, stays or self.place.axis.size == 1)

    def drop(self, t: torch.Tensor) -> None:
        """Free the memory of a tensor without a value."""
        k = self.kept[storage_key(t)]
        if not k.stays:
            k.tensor.untyped_storage().resize_(0)
            k.resident = False

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        used = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.bring([k for x in used if (k := self.kept.get(storage_key(x))) is not None])
        for i, a in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(a.name)
            if a.alias_info is not None and a.alias_info.is_write:
                for x in tree_leaves(value):
                    self.wrote(x)
        return func(*args, **kwargs)

    def wrote(self, x: object) -> None:
        k = self.kept.get(storage_key(x)) if isinstance(x, torch.Tensor) else None
        if k is None:
            return
        if k.written is not None and k.written != self.by:
            raise PlanError(
                f"{self.by} and {k.written} share a parameter and both initialise it: pass the "
                "constructor, plan.init(model, build=lambda: Model(...))"
            )
        k.written = self.by

    def bring(self, wanted: list[_Kept]) -> None:
        """These are there, no other that need not stay is."""
        here = [k for k in wanted if not k.stays]
        if not here:
            return
        for k in self.kept.values():
            if k.resident and not k.stays and not any(k is w for w in here):
                self._leave(k)
        for k in here:
            if not k.resident:
                self._return(k)

    def store(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Copy this rank's part of a tensor that is not needed any more."""
        k = self.kept.get(storage_key(whole))
        if k is not None:
            self.bring([k])
        _part(part, whole)
        if k is not None:
            self.drop(whole)

    def _leave(self, k: _Kept) -> None:
        axis, n = self.place.axis, k.tensor.numel()
        rows = -(-n // axis.size)
        part = k.tensor[min(axis.rank * rows, n) : min((axis.rank + 1) * rows, n)]
        k.chunk = torch.cat([part, part.new_zeros(rows - part.numel())])
        k.tensor.untyped_storage().resize_(0)
        k.resident = False

    def _return(self, k: _Kept) -> None:
        n = k.tensor.numel()
        k.tensor.untyped_storage().resize_(n * k.tensor.element_size())
        if k.chunk is not None:
            steps = exchange.gather_weight(self.place.axis, k.chunk, 0, n)
            got = distributed(steps, self.place.axis, self.place.groups, "an initial value")
            k.tensor.copy_(got)
        k.chunk, k.resident = None, True


def initialise(
    model: nn.Module,
    place: Place,
    build: Callable[[], nn.Module] | None = None,
    init_fn: Callable[[nn.Module], object] | None = None,
) -> None:
    """Collective. Raises `PlanError` naming what no initialiser wrote."""
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if x.is_meta:
            raise PlanError(f"{name} is on meta: model.to_empty(device=...) first")
    if build is not None and init_fn is not None:
        raise PlanError("plan.init takes build= (a constructor) or init_fn= (in place), not both")
    _one_generator(model, place)
    build = None if init_fn is not None else build or _configured(model)
    with torch.no_grad():
        if build is not None:
            _rebuild(model, place, build)
        else:
            _in_place(model, place, init_fn)


def _one_generator(model: nn.Module, place: Place) -> None:
    """Every rank of every replica goes on from the first one's random state."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name in ("replica checks", "checks"):
        group = place.groups.get(name)
        if group is None:
            continue
        source = dist.get_global_rank(group, 0)
        state = torch.get_rng_state()
        dist.broadcast(state, source, group)
        torch.set_rng_state(state)
        if device.type != "cpu":
            module = torch.get_device_module(device)
            state = module.get_rng_state(device)
            dist.broadcast(state, source, group)
            module.set_rng_state(state, device)


def _configured(model: nn.Module) -> Callable[[], nn.Module] | None:
    """The constructor of a model that its class makes from its `config` alone."""
    cls, config = getattr(type(model), "_tspc_class", type(model)), getattr(model, "config", None)
    if config is None or not hasattr(cls, "_from_config"):
        return None
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def build() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype or before)
        try:
            return cls(copy.deepcopy(config))
        finally:
            torch.set_default_dtype(before)

    return build


def _rebuild(model: nn.Module, place: Place, build: Callable[[], nn.Module]) -> None:
    """The constructor's values, parameter by parameter."""
    wholes = Wholes(place)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    hook = register_module_parameter_registration_hook(
        lambda module, name, p: None if p is None else wholes.keep(p)
    )
    try:
        with wholes, torch.device(device):
            built = build()
    finally:
        hook.remove()
    built_tensors = dict(built.named_parameters()) | dict(built.named_buffers())
    for name, stored in [*model.named_parameters(), *model.named_buffers()]:
        if name not in built_tensors or built_tensors[name].shape != stored.shape:
            shape = (
                tuple(built_tensors[name].shape)
                if name in built_tensors
                else "nothing of that name"
            )
            raise PlanError(
                f"{name} is {tuple(stored.shape)}, what was built has {shape}: build= makes the "
                "model that was planned"
            )
        wholes.store(stored, built_tensors[name])


def _part(stored: torch.Tensor, whole: torch.Tensor) -> None:
    """This rank's part of a whole tensor; no communication."""
    whole = whole.detach()
    if isinstance(stored, DTensor):
        part = distribute_tensor(whole, stored.device_mesh, stored.placements, src_data_rank=None)
        stored.to_local().copy_(part.to_local())
    else:
        stored.copy_(whole)


def _in_place(
    model: nn.Module, place: Place, init_fn: Callable[[nn.Module], object] | None
) -> None:
    """Run an initialiser on the model itself, whose parameters are whole meanwhile."""
    wholes = Wholes(place)
    with _whole(model, wholes) as pairs:
        watched = [(n, x) for n, x in [*model.named_parameters(), *model.named_buffers()]]
        with wholes:
            if init_fn is None:
                _own(model, wholes)
            else:
                init_fn(model)
        now = dict(model.named_parameters()) | dict(model.named_buffers())
        left = [
            n
            for n, x in watched
            if now.get(n) is x and x.numel() and wholes.kept[storage_key(x)].written is None
        ]
        if left:
            owner = left[0].rpartition(".")[0] or "the model"
            kind = type(model.get_submodule(left[0].rpartition(".")[0])).__name__
            raise PlanError(
                f"nothing initialises {', '.join(left[:4])}: {owner} ({kind}) has no "
                "reset_parameters that writes it. Pass the constructor, plan.init(model, "
                "build=lambda: Model(...)), or a function, plan.init(model, init_fn=...)"
            )
        for stored, p in pairs:
            wholes.store(stored, p)


@contextlib.contextmanager
def _whole(model: nn.Module, wholes: Wholes) -> Iterator[list[tuple[nn.Parameter, nn.Parameter]]]:
    """The model with a whole parameter, without memory, in the place of each shard."""
    by_id: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    places: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    for m in model.modules():
        for n, p in m._parameters.items():
            if p is None:
                continue
            if isinstance(p, DTensor) and id(p) not in by_id:
                data = torch.empty(p.shape, dtype=p.dtype, device=p.device)
                by_id[id(p)] = p, nn.Parameter(data, requires_grad=p.requires_grad)
                wholes.keep(by_id[id(p)][1])
                wholes.drop(by_id[id(p)][1])
            elif not isinstance(p, DTensor):
                wholes.keep(p, stays=True)
            if id(p) in by_id:
                places.append((m._parameters, n, p))
                m._parameters[n] = by_id[id(p)][1]
    for b in model.buffers():
        wholes.keep(b, stays=True)
    try:
        yield list(by_id.values())
    finally:
        for parameters, n, p in places:
            parameters[n] = p


def _own(model: nn.Module, wholes: Wholes) -> None:
    """The model's `init_weights()`, else `reset_parameters()` of each module in order."""
    whole_model = getattr(model, "init_weights", None)
    if callable(whole_model) and not _needs(whole_model):
        wholes.by = "init_weights"
        whole_model()
        return
    for name, m in model.named_modules():
        reset = next((getattr(m, r) for r in RESETS if callable(getattr(m, r, None))), None)
        if reset is not None:
            wholes.by = name or "the model"
            reset()


def _needs(fn: Callable[..., object]) -> bool:
    """It takes arguments without a default."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(
        p.default is p.empty and p.kind not in kinds
        for p in inspect.signature(fn).parameters.values()
    )
