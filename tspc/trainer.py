"""The ranks of a TSP axis as one process for accelerate and what is built on it (Trainer,
SFTTrainer, DPOTrainer): `tspc.trainer.register()` before the first `Accelerator` or
`TrainingArguments`.

Then they know `tsp` as a backend; a replica is what they call a process: its ranks get the same
data, replicas other data, losses and metrics are gathered from one rank of each, rank 0 alone logs
and writes, and what is written is whole.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tspc.errors import OptionError
from tspc.options import parse
from tspc.runtime.accumulate import no_sync
from tspc.runtime.mesh import resolve

_NAME = "TSP"
_OPTIONS: dict[str, Any] = {}
_DONE: list[str] = []


@dataclass(frozen=True)
class Replicas:
    """What the libraries take for processes.

    peers: the group of the ranks with this one's place on their axes, None where there is one
    replica. firsts: the first rank of each replica.
    """

    count: int = 1
    index: int = 0
    peers: Any = None
    firsts: tuple[int, ...] = (0,)


_REPLICAS = [Replicas()]


def register(**options: object) -> None:
    """Make accelerate, and transformers' Trainer where it is installed, take `"tsp"` as the
    backend of torch.compile; on one process this changes nothing else.

    options: of the backend, as in `torch.compile(options=...)`. With a mesh of two axes the ranks
    of one TSP axis are what these libraries call a process: `num_processes` counts replicas,
    `process_index` is that of this rank's replica, `is_main_process` is true on rank 0 alone.
    Raises `OptionError` for a mesh that has not all ranks, and where an `Accelerator` was made
    before; `PlanError` for a mesh of two axes without a TSP axis.
    """
    from accelerate import state

    replicas = _replicas(options)
    before: Any = state.PartialState._shared_state
    if (
        before.get("num_processes", 1) > 1
        and not _shared()
        or _shared()
        and (before["num_processes"] != replicas.count)
    ):
        raise OptionError(
            "an Accelerator or TrainingArguments was made before tspc.trainer.register(): its "
            "state takes each rank for a replica, or has other replicas; call register() first"
        )
    _OPTIONS.clear()
    _OPTIONS.update(options)
    _REPLICAS[:] = [replicas]
    if _NAME in _DONE:
        return
    _DONE.append(_NAME)
    _accelerate()
    try:
        from transformers import Trainer, trainer, training_args
    except ImportError:
        return
    _trainer(Trainer, trainer, training_args.TrainingArguments)


def _replicas(options: dict[str, object]) -> Replicas:
    """Those of the options' mesh, or of their plan's."""
    chosen = parse(options)
    if chosen.mesh is None:
        return Replicas()
    place, storage = resolve(chosen, torch.device(chosen.mesh.device_type))
    ranks = chosen.mesh.mesh.flatten().tolist()
    if len(ranks) != dist.get_world_size() or ranks[0]:
        raise OptionError(
            f"tspc.trainer.register: the mesh has the ranks {ranks} of {dist.get_world_size()}: "
            "give one of all ranks that begins with rank 0, (replicas, TSP axis), or start as many "
            "ranks as it has"
        )
    if place.replicas is None or storage is None:
        return Replicas()
    firsts = storage.mesh[0].tolist()
    return Replicas(
        place.replicas.size, place.replicas.rank, place.groups["replicas"], tuple(firsts)
    )


def _shared() -> bool:
    """Whether ranks share the model."""
    from accelerate.state import PartialState

    kind: Any = PartialState._shared_state.get("distributed_type")
    return kind is not None and kind.value == _NAME


def _first() -> bool:
    """Whether this rank is the first of its replica."""
    return dist.get_rank() in _REPLICAS[0].firsts


def _accelerate() -> None:
    from accelerate import accelerator, optimizer, state
    from accelerate.utils import (
        DistributedType,
        DynamoBackend,
        TorchDynamoPlugin,
        constants,
        operations,
        random,
    )

    tsp = _member(DistributedType)
    _member(DynamoBackend)

    def start(do: Callable[..., object], self: Any, *args: object, **kwargs: object) -> None:
        do(self, *args, **kwargs)
        if self.num_processes > 1 and self.distributed_type is not tsp:
            self.distributed_type = tsp
            self.num_processes, self.process_index = _REPLICAS[0].count, _REPLICAS[0].index

    def main(do: Callable[..., bool], self: Any) -> bool:
        return dist.get_rank() == 0 if _shared() else do(self)

    def last(do: Callable[..., bool], self: Any) -> bool:
        return dist.get_rank() == _REPLICAS[0].firsts[-1] if _shared() else do(self)

    _wrap(state.PartialState, "__init__", start)
    _property(state.PartialState, "is_main_process", main)
    _property(state.PartialState, "is_last_process", last)
    _property(accelerator.Accelerator, "is_last_process", last)
    _property(state.PartialState, "use_distributed", lambda do, self: _shared() or do(self))
    _wrap(state.PartialState, "wait_for_everyone", _wait)
    _wrap(TorchDynamoPlugin, "to_kwargs", _compiling)
    _wrap(accelerator, "prepare_data_loader", _loader)
    _wrap(accelerator, "save_accelerator_state", _written)
    _wrap(accelerator.Accelerator, "no_sync", _quiet)
    _wrap(accelerator.Accelerator, "check_trigger", _trigger)
    _wrap(accelerator.Accelerator, "join_uneven_inputs", _join)
    _wrap(optimizer.AcceleratedOptimizer, "step", _step)
    _wrap(random, "synchronize_rng_state", _synchronize)
    constants.TORCH_DISTRIBUTED_OPERATION_TYPES.append(_NAME)
    _wrap(operations, "_gpu_gather", _gather)
    _wrap(operations, "_gpu_gather_object", _gather)
    # `reduce`, `gather` and their kin are imported by name all over: what they call is exchanged
    operations.torch = _Part(torch, distributed=_among_replicas())  # type: ignore[assignment]


def _trainer(cls: Any, module: Any, arguments: Any) -> None:
    """What the Trainer does on the writing rank alone is done on all where it needs them."""
    from accelerate.utils import operations

    def on_first(do: Callable[..., object], self: Any, *args: object) -> None:
        if not _shared() or _first():
            do(self, *args)

    def zero(do: Callable[..., bool], self: Any) -> bool:
        return do(self) and (not _shared() or dist.get_rank() == 0)

    def writer(node: str) -> Callable[..., bool]:
        return lambda do, self: do(self) if getattr(self, node) else zero(do, self)

    def gathered(do: Callable[..., object], tensors: Any, *args: object, **kwargs: object) -> Any:
        if not _shared() or tensors is None:
            return do(tensors, *args, **kwargs)
        return operations.gather(tensors)

    def scalars(
        do: Callable[..., object], values: Sequence[float], count: int | None = None, **kwargs: Any
    ) -> Any:
        if not _shared():
            return do(values, count, **kwargs)
        return operations.gather(torch.tensor(values, dtype=torch.float64, **kwargs))[:count]

    _wrap(cls, "_save_rng_state", on_first)
    _wrap(cls, "is_world_process_zero", zero)
    _wrap(cls, "hyperparameter_search", _search)
    _property(arguments, "should_save", writer("save_on_each_node"))
    _property(arguments, "should_log", writer("log_on_each_node"))
    _wrap(module, "nested_gather", gathered)
    _wrap(module, "distributed_broadcast_scalars", scalars)


def _wait(do: Callable[..., object], self: Any) -> None:
    if _shared():
        dist.barrier()
    else:
        do(self)


def _compiling(do: Callable[..., dict[str, Any]], self: Any) -> dict[str, Any]:
    """The options of torch.compile."""
    kwargs = do(self)
    if kwargs.get("backend") != _NAME.lower() or not (_OPTIONS or kwargs.get("options")):
        return kwargs
    theirs = kwargs.get("options") or {}
    for name in ("mesh", "axis", "plan"):
        if theirs.get(name, _OPTIONS.get(name)) is not _OPTIONS.get(name):
            raise OptionError(
                f"option {name!r} of a TorchDynamoPlugin says which ranks share the data, which "
                f"accelerate asks before: give it as tspc.trainer.register({name}=...)"
            )
    if _OPTIONS:
        kwargs.pop("mode", None)
        kwargs["options"] = {**_OPTIONS, **theirs}
    return kwargs


def _loader(do: Callable[..., object], *args: object, **kwargs: object) -> object:
    """Every rank reads for itself: nobody sends batches."""
    if _shared():
        kwargs["dispatch_batches"] = False
    return do(*args, **kwargs)


def _written(do: Callable[..., object], folder: Any, *args: object, **kwargs: object) -> object:
    """The random state is one file of each replica."""
    return do(folder, *args, **kwargs) if not _shared() or _first() else folder


def _quiet(
    do: Callable[..., AbstractContextManager[None]], self: Any, model: Any
) -> AbstractContextManager[None]:
    return no_sync(model) if _shared() and _REPLICAS[0].count > 1 else do(self, model)


def _trigger(do: Callable[..., bool], self: Any) -> bool:
    """Set on any rank, it is on all."""
    if _shared():
        if self.flag_tensor is None:
            self.flag_tensor = torch.tensor(0, device=self.device)
        dist.all_reduce(self.flag_tensor, dist.ReduceOp.MAX)
    return do(self)


def _join(
    do: Callable[..., object], self: Any, joinables: Any, even_batches: bool | None = None
) -> object:
    even = self.even_batches if even_batches is None else even_batches
    if _shared() and _REPLICAS[0].count > 1 and not even:
        raise OptionError(
            "accelerate's join_uneven_inputs is for DDP: replicas of tspc make as many steps each; "
            "leave even_batches=True, or drop_last=True of the DataLoader"
        )
    return do(self, joinables, even_batches)


def _step(do: Callable[..., object], self: Any, *args: object, **kwargs: object) -> object:
    """Of parameters that tspc does not hold, nobody averages the gradients."""
    if _shared() and _REPLICAS[0].count > 1:
        params = [p for g in self.optimizer.param_groups for p in g["params"]]
        plain = [p for p in params if p.grad is not None and not isinstance(p, DTensor)]
        if plain:
            shapes = ", ".join(str(tuple(p.shape)) for p in plain[:3])
            raise OptionError(
                f"{len(plain)} of {len(params)} parameters of the optimizer are outside of what "
                f'backend "tsp" compiled ({shapes}): their gradients are not averaged over the '
                "replicas. Prepare the whole model with dynamo_backend='tsp' (Trainer: "
                "torch_compile_backend='tsp'), without regional compilation, or register a mesh "
                "without replicas"
            )
    return do(self, *args, **kwargs)


def _synchronize(
    do: Callable[..., object], rng_type: Any = None, generator: torch.Generator | None = None
) -> None:
    """Rank 0's random state on all, which decides the order of the data."""
    if not _shared() or _REPLICAS[0].count == 1:
        do(rng_type, generator)
        return
    name = getattr(rng_type, "value", rng_type)
    of: Any = {"torch": torch, "cuda": torch.cuda, "generator": generator}[name]
    get, put = (
        ("get_state", "set_state") if name == "generator" else ("get_rng_state", "set_rng_state")
    )
    from accelerate.state import PartialState

    state = getattr(of, get)().to(PartialState().device)
    dist.broadcast(state, 0)
    getattr(of, put)(state.cpu())


def _gather(do: Callable[..., object], x: object) -> object:
    """One replica gathers as one process does."""
    return x if _shared() and _REPLICAS[0].count == 1 else do(x)


def _search(do: Callable[..., object], self: Any, *args: object, **kwargs: object) -> object:
    if _shared():
        raise OptionError(
            "Trainer.hyperparameter_search sends trials from one process to the others and does "
            "not know ranks that share a model: run each trial as a script of its own"
        )
    return do(self, *args, **kwargs)


class _Part(types.ModuleType):
    """A module, but for some names."""

    def __init__(self, of: types.ModuleType, **names: object):
        super().__init__(of.__name__)
        self.__dict__.update(names, _of=of)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_of"], name)


def _among_replicas() -> types.ModuleType:
    """torch.distributed where processes are replicas: what is gathered comes from one rank of each,
    what one sends goes from its first rank to all."""

    def gathering(do: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if not _shared():
                return do(*args, **kwargs)
            here = _REPLICAS[0]
            return do(*args, **kwargs, group=here.peers) if here.count > 1 else None

        return call

    def sending(do: Callable[..., object]) -> Callable[..., object]:
        def call(x: object, src: int = 0) -> object:
            return do(x, src=_REPLICAS[0].firsts[src] if _shared() else src)

        return call

    gathers = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce")
    names = {n: gathering(getattr(dist, n)) for n in gathers}
    names |= {n: sending(getattr(dist, n)) for n in ("broadcast", "broadcast_object_list")}
    return _Part(dist, **names)


def _property(owner: Any, name: str, do: Callable[..., object]) -> None:
    """owner.name becomes do(what it was, the object)."""
    before = getattr(owner, name).fget
    setattr(owner, name, property(functools.wraps(before)(functools.partial(do, before))))


def _wrap(owner: Any, name: str, do: Callable[..., object]) -> None:
    """owner.name(...) becomes do(what it was, ...)."""
    before = getattr(owner, name)

    @functools.wraps(before)
    def call(*args: object, **kwargs: object) -> object:
        return do(before, *args, **kwargs)

    setattr(owner, name, call)


def _member(kind: Any) -> Any:
    """A new member of an enumeration of names: the libraries look backends up in theirs only."""
    assert issubclass(kind, enum.Enum)
    if _NAME not in kind.__members__:
        new = str.__new__(kind, _NAME) if issubclass(kind, str) else object.__new__(kind)
        new._name_ = new._value_ = _NAME
        kind._member_names_.append(_NAME)
        kind._member_map_[_NAME] = new
        kind._value2member_map_[_NAME] = new
        type.__setattr__(kind, _NAME, new)
    return kind[_NAME]
