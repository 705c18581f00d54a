"""The ranks of a TSP axis as one process for accelerate and what is built on it (Trainer,
SFTTrainer, DPOTrainer): `tspc.trainer.register()` before the first `Accelerator` or
`TrainingArguments`.

Then they know `tsp` as a backend; a replica is what they call a process: its ranks get the same
data, replicas other data, losses and metrics are gathered from one rank of each, rank 0 alone logs
and writes, and what is written is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tspc.base.errors import OptionError
from tspc.base.options import parse
from tspc.base.state import PROCESS, remembered
from tspc.processes import (
    NAME,
    Replicas,
    among_replicas,
    first,
    member,
    replicas,
    shared,
    use,
    wrap,
    wrap_property,
)
from tspc.runtime.mesh import resolve
from tspc.runtime.params.accumulate import no_sync

_OPTIONS: dict[str, object] = remembered(PROCESS, {})
_DONE: list[str] = remembered(PROCESS, [])
Context = AbstractContextManager[object]


class _State(Protocol):
    """What a `PartialState` says of the processes."""

    distributed_type: object
    num_processes: int
    process_index: int


class _Accelerator(Protocol):
    device: torch.device
    even_batches: bool
    flag_tensor: torch.Tensor | None
    profile_handler: object


class _Optimizer(Protocol):
    """accelerate's, around one of torch's."""

    optimizer: torch.optim.Optimizer


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

    now = _counted(options)
    before: dict[str, Any] = state.PartialState._shared_state
    counted = before.get("num_processes", 1), before.get("process_index", 0)
    if counted != (now.count, now.index) if shared() else counted[0] > 1:
        raise OptionError(
            "an Accelerator or TrainingArguments was made before tspc.trainer.register(): its "
            "state takes each rank for a replica, or has other replicas; call register() first"
        )
    _OPTIONS.clear()
    _OPTIONS.update(options)
    use(now)
    if NAME in _DONE:
        return
    _DONE.append(NAME)
    _accelerate()
    try:
        from transformers import Trainer, trainer, training_args
    except ImportError:
        return
    _trainer(Trainer, trainer, training_args.TrainingArguments)


def _counted(options: dict[str, object]) -> Replicas:
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

    tsp = member(DistributedType)
    member(DynamoBackend)

    def start(do: Callable[..., object], self: _State, *args: object, **kwargs: object) -> None:
        do(self, *args, **kwargs)
        if self.num_processes > 1 and self.distributed_type is not tsp:
            self.distributed_type = tsp
            self.num_processes, self.process_index = replicas().count, replicas().index

    def main(do: Callable[..., bool], self: object) -> bool:
        return dist.get_rank() == 0 if shared() else do(self)

    def last(do: Callable[..., bool], self: object) -> bool:
        return dist.get_rank() == replicas().firsts[-1] if shared() else do(self)

    wrap(state.PartialState, "__init__", start)
    wrap_property(state.PartialState, "is_main_process", main)
    wrap_property(state.PartialState, "is_last_process", last)
    wrap_property(accelerator.Accelerator, "is_last_process", last)
    wrap_property(state.PartialState, "use_distributed", lambda do, self: shared() or do(self))
    wrap(state.PartialState, "wait_for_everyone", _wait)
    wrap(TorchDynamoPlugin, "to_kwargs", _compiling)
    wrap(accelerator, "prepare_data_loader", _loader)
    wrap(accelerator, "save_accelerator_state", _written)
    wrap(accelerator.Accelerator, "no_sync", _quiet)
    wrap(accelerator.Accelerator, "profile", _profile)
    wrap(accelerator.Accelerator, "check_trigger", _trigger)
    wrap(accelerator.Accelerator, "join_uneven_inputs", _join)
    wrap(optimizer.AcceleratedOptimizer, "step", _step)
    wrap(random, "synchronize_rng_state", _synchronize)
    constants.TORCH_DISTRIBUTED_OPERATION_TYPES.append(NAME)
    wrap(operations, "_gpu_gather", _gather)
    wrap(operations, "_gpu_gather_object", _gather)
    # `reduce`, `gather` and their kin are imported by name all over: what they call is exchanged
    operations.torch = among_replicas()  # type: ignore[assignment]


def _trainer(cls: type, module: ModuleType, arguments: type) -> None:
    """What the Trainer does on the writing rank alone is done on all where it needs them."""
    from accelerate.utils import operations

    def on_first(do: Callable[..., object], self: object, *args: object) -> None:
        if not shared() or first():
            do(self, *args)

    def zero(do: Callable[..., bool], self: object) -> bool:
        return do(self) and (not shared() or dist.get_rank() == 0)

    def writer(node: str) -> Callable[..., bool]:
        return lambda do, self: do(self) if getattr(self, node) else zero(do, self)

    def gathered(
        do: Callable[..., object], tensors: object, *args: object, **kwargs: object
    ) -> object:
        if not shared() or tensors is None:
            return do(tensors, *args, **kwargs)
        return operations.gather(tensors)

    def scalars(
        do: Callable[..., object], values: Sequence[float], count: int | None = None, **kwargs: Any
    ) -> object:
        if not shared():
            return do(values, count, **kwargs)
        return operations.gather(torch.tensor(values, dtype=torch.float64, **kwargs))[:count]

    wrap(cls, "_save_rng_state", on_first)
    wrap(cls, "is_world_process_zero", zero)
    wrap(cls, "hyperparameter_search", _search)
    wrap_property(arguments, "should_save", writer("save_on_each_node"))
    wrap_property(arguments, "should_log", writer("log_on_each_node"))
    wrap(module, "nested_gather", gathered)
    wrap(module, "distributed_broadcast_scalars", scalars)


def _wait(do: Callable[..., object], self: object) -> None:
    if shared():
        dist.barrier()
    else:
        do(self)


def _compiling(do: Callable[..., dict[str, Any]], self: object) -> dict[str, Any]:
    """The options of torch.compile."""
    kwargs = do(self)
    if kwargs.get("backend") != NAME.lower() or not (_OPTIONS or kwargs.get("options")):
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
    """The ranks of one replica read for themselves: nobody sends batches."""
    if shared() and replicas().count == 1:
        kwargs["dispatch_batches"] = False
    return do(*args, **kwargs)


def _written(do: Callable[..., object], folder: object, *args: object, **kwargs: object) -> object:
    """The random state is one file of each replica."""
    return do(folder, *args, **kwargs) if not shared() or first() else folder


def _profile(do: Callable[..., Context], self: _Accelerator, handler: Any = None) -> Context:
    """A trace is a file of each process: ranks that are not its first have folders."""
    handler = handler or self.profile_handler
    folder = getattr(handler, "output_trace_dir", None)
    if shared() and folder is not None and not first():
        handler = replace(handler, output_trace_dir=f"{folder}/rank_{dist.get_rank()}")
    return do(self, handler)


def _quiet(do: Callable[..., Context], self: object, model: torch.nn.Module) -> Context:
    return no_sync(model) if shared() and replicas().count > 1 else do(self, model)


def _trigger(do: Callable[..., bool], self: _Accelerator) -> bool:
    """Set on any rank, it is on all."""
    if shared():
        if self.flag_tensor is None:
            self.flag_tensor = torch.tensor(0, device=self.device)
        dist.all_reduce(self.flag_tensor, dist.ReduceOp.MAX)
    return do(self)


def _join(
    do: Callable[..., object],
    self: _Accelerator,
    joinables: object,
    even_batches: bool | None = None,
) -> object:
    even = self.even_batches if even_batches is None else even_batches
    if shared() and replicas().count > 1 and not even:
        raise OptionError(
            "accelerate's join_uneven_inputs is for DDP: replicas of tspc make as many steps each; "
            "leave even_batches=True, or drop_last=True of the DataLoader"
        )
    return do(self, joinables, even_batches)


def _step(do: Callable[..., object], self: _Optimizer, *args: object, **kwargs: object) -> object:
    """Of parameters that tspc does not hold, nobody averages the gradients."""
    if shared() and replicas().count > 1:
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
    do: Callable[..., object], rng_type: object = None, generator: torch.Generator | None = None
) -> None:
    """Rank 0's random state on all, which decides the order of the data."""
    if not shared() or replicas().count == 1:
        do(rng_type, generator)
        return
    name = str(getattr(rng_type, "value", rng_type))
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
    return x if shared() and replicas().count == 1 else do(x)


def _search(do: Callable[..., object], self: object, *args: object, **kwargs: object) -> object:
    if shared():
        raise OptionError(
            "Trainer.hyperparameter_search sends trials from one process to the others and does "
            "not know ranks that share a model: run each trial as a script of its own"
        )
    return do(self, *args, **kwargs)
