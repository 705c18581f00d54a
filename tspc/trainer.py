"""The ranks of an axis as one replica for accelerate and what is built on it (Trainer, SFTTrainer,
DPOTrainer): `tspc.trainer.register()` before the first `Accelerator` or `TrainingArguments`.

Then they know `tsp` as a backend; data, steps, losses and metrics are those of one process, rank 0
alone logs and writes, and what is written is whole.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from tspc.errors import OptionError

_NAME = "TSP"
_OPTIONS: dict[str, Any] = {}
_DONE: list[str] = []


def register(**options: object) -> None:
    """Make accelerate, and transformers' Trainer where it is installed, take `"tsp"` as the
    backend of torch.compile; on one process this changes nothing else.

    options: of the backend, as in `torch.compile(options=...)`. Raises `OptionError` for a mesh of
    two axes, which they cannot be told of yet, and where an `Accelerator` was made before.
    """
    from accelerate import state

    mesh = options.get("mesh")
    if getattr(mesh, "ndim", 1) != 1:
        raise OptionError(
            "tspc.trainer.register takes a mesh of one axis, all ranks: replicas are for scripts "
            "with a loop of their own"
        )
    processes = state.PartialState._shared_state.get("num_processes", 1)
    if processes > 1 and _NAME not in _DONE:
        raise OptionError(
            "an Accelerator or TrainingArguments was made before tspc.trainer.register(): its "
            "state takes each rank for a replica; call register() first"
        )
    _OPTIONS.clear()
    _OPTIONS.update(options)
    if _NAME in _DONE:
        return
    _DONE.append(_NAME)
    _accelerate()
    try:
        from transformers import Trainer, trainer
    except ImportError:
        return
    _trainer(Trainer, trainer)


def _accelerate() -> None:
    from accelerate import accelerator, state
    from accelerate.utils import DistributedType, DynamoBackend, TorchDynamoPlugin

    tsp = _member(DistributedType)
    _member(DynamoBackend)

    def shared() -> bool:
        """Whether ranks share the model."""
        return state.PartialState._shared_state.get("distributed_type") is tsp

    def start(do: Callable[..., object], self: Any, *args: object, **kwargs: object) -> None:
        do(self, *args, **kwargs)
        if self.num_processes > 1:
            self.distributed_type, self.num_processes = tsp, 1

    def wait(do: Callable[..., object], self: Any) -> None:
        if shared():
            dist.barrier()
        else:
            do(self)

    def compiling(do: Callable[..., dict[str, Any]], self: Any) -> dict[str, Any]:
        kwargs = do(self)
        if kwargs.get("backend") == _NAME.lower() and _OPTIONS:
            kwargs.pop("mode", None)
            kwargs["options"] = {**_OPTIONS, **(kwargs.get("options") or {})}
        return kwargs

    def loader(do: Callable[..., object], *args: object, **kwargs: object) -> object:
        """Every rank reads for itself: nobody sends batches."""
        if shared():
            kwargs["dispatch_batches"] = False
        return do(*args, **kwargs)

    _wrap(state.PartialState, "__init__", start)
    _wrap(state.PartialState, "wait_for_everyone", wait)
    _wrap(TorchDynamoPlugin, "to_kwargs", compiling)
    _wrap(accelerator, "prepare_data_loader", loader)


def _trainer(cls: Any, module: Any) -> None:
    """What the Trainer does on the writing rank alone is done on all where it needs them."""
    from accelerate import PartialState

    def shared(self: Any) -> bool:
        return self.args.distributed_state.distributed_type.value == _NAME

    def on_writer(do: Callable[..., object], self: Any, *args: object) -> None:
        if not shared(self) or self.args.should_save:
            do(self, *args)

    def seed(do: Callable[..., object], worker: int, num_workers: int, rank: int) -> None:
        do(worker, num_workers, 0 if PartialState().distributed_type.value == _NAME else rank)

    _wrap(cls, "_save_rng_state", on_writer)
    _wrap(module, "seed_worker", seed)


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
