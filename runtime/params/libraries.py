"""Writers of other libraries that are loaded already: called on all ranks, they write whole tensors
from the first one.

A library is touched only if the process has imported it; its functions do what they did for
models without shards.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from tspc.base.state import PROCESS, remembered
from tspc.runtime.params.stored import is_stored
from tspc.runtime.params.whole import Sharers, identity
from tspc.runtime.params.writing import gathered, settled, writing
from tspc.seams.tensors import tree_leaves

_DONE: set[tuple[str, str]] = remembered(PROCESS, set())
SAVE = "save_pretrained"
Plain = Callable[..., Any]  # the function that is called around


class _Accelerator(Protocol):
    _models: list[nn.Module]
    _optimizers: list[torch.optim.Optimizer]


class _Arguments(Protocol):
    save_only_model: bool


class _Trainer(Protocol):
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    args: _Arguments


def adapt(module: nn.Module | None = None) -> None:
    """Those imported since the last time; and the `save_pretrained` of a module's own parts."""
    for (name, owner, method), around in METHODS.items():
        if (name, f"{owner}.{method}") not in _DONE and name in sys.modules:
            target = getattr(sys.modules[name], owner, None)
            if target is not None:  # else it is being imported
                _DONE.add((name, f"{owner}.{method}"))
                _around(target, method, around)
    for (name, function), around in FUNCTIONS.items():
        if (name, function) not in _DONE and hasattr(sys.modules.get(name), function):
            _DONE.add((name, function))
            _around(sys.modules[name], function, around)
    for m in () if module is None else module.modules():
        for cls in type(m).__mro__:
            if SAVE in cls.__dict__:
                _around(cls, SAVE, _save_pretrained)


def _around(owner: type | ModuleType, name: str, around: Callable[..., object]) -> None:
    """owner.name(...) becomes around(the function itself, ...)."""
    plain = owner.__dict__.get(name)
    if plain is None or not callable(plain) or hasattr(plain, "_tspc_plain"):
        return

    @functools.wraps(plain)
    def call(*args: object, **kwargs: object) -> object:
        return around(plain, *args, **kwargs)

    call.__dict__["_tspc_plain"] = plain
    setattr(owner, name, call)


def _save_pretrained(plain: Plain, self: object, *args: object, **kwargs: object) -> object:
    """model.save_pretrained(folder, ...)"""
    state, what = kwargs.get("state_dict"), f"{type(self).__name__}.{SAVE}"
    if not isinstance(self, nn.Module):
        return plain(self, *args, **kwargs)
    if state is not None and any(is_stored(x) for x in tree_leaves(state)):
        kwargs["state_dict"], among = gathered(what, state)
        with settled(what, among):
            return plain(self, *args, **kwargs) if among.first else None
    if state is not None:
        return plain(self, *args, **kwargs)
    with writing(what, [self]) as writes:
        return plain(self, *args, **kwargs) if writes else None


def _state_of(
    plain: Plain, self: object, model: nn.Module, *args: object, **kwargs: object
) -> object:
    """accelerator.get_state_dict(model): empty on the other ranks, as for other sharded models."""
    with writing("Accelerator.get_state_dict", [model]) as writes:
        return plain(self, model, *args, **kwargs) if writes else {}


def _save_state(plain: Plain, self: _Accelerator, *args: object, **kwargs: object) -> object:
    """accelerator.save_state(folder)"""
    with writing("Accelerator.save_state", self._models, self._optimizers):
        return plain(self, *args, **kwargs)


def _checkpoint(name: str) -> Callable[..., object]:
    """trainer.save_model(folder), and what it does at a checkpoint"""

    def save(plain: Plain, self: _Trainer, *args: object, **kwargs: object) -> object:
        optimizers = [] if self.optimizer is None else [self.optimizer]
        both = name == "_save_checkpoint" and not self.args.save_only_model
        chosen = optimizers if both else []
        with writing(f"Trainer.{name}", [self.model], chosen):
            return plain(self, *args, **kwargs)

    return save


def _fabric_save(
    plain: Plain,
    self: object,
    path: object,
    state: Mapping[str, object],
    *args: object,
    **kwargs: object,
) -> object:
    """fabric.save(path, {"model": model, ...}) ends in this of a strategy."""
    values = list(state.values())
    models = [x for x in values if isinstance(x, nn.Module)]
    optimizers = [x for x in values if isinstance(x, torch.optim.Optimizer)]
    with writing("Fabric.save", models, optimizers) as writes:
        return plain(self, path, state, *args, **kwargs) if writes else None


class _Shared(dict):
    """What safetensors writes of shards: on the first rank all of it, nothing on the others."""

    among: Sharers


SAFETENSORS = "the saving by safetensors"


def _flat(plain: Plain, tensors: Mapping[str, object], *keep: object) -> object:
    """Of safetensors: the tensors as memory; what `save_file`, `save_model`, `save` begin with."""
    if not any(is_stored(x) for x in tensors.values()):
        return plain(tensors, *keep)
    whole, among = gathered(SAFETENSORS, dict(tensors))
    with settled(SAFETENSORS, among):
        out = _Shared(plain(whole, *keep) if among.first else {})
    out.among = among
    return out


def _to_file(plain: Plain, flat: object, *args: object, **kwargs: object) -> object:
    """Of safetensors: `serialize_file` and `serialize`, whose bytes are empty on the others."""
    if not isinstance(flat, _Shared):
        return plain(flat, *args, **kwargs)
    with settled(SAFETENSORS, flat.among):
        return plain(dict(flat), *args, **kwargs) if flat.among.first else b""


def _duplicates(plain: Plain, state: Mapping[str, object], **kwargs: object) -> object:
    """Of safetensors: which names are one tensor; a shard has no address, so it is known by its
    local one."""
    stand: dict[object, torch.Tensor] = {}

    def instead(x: object) -> object:
        if not isinstance(x, DTensor):
            return x
        return stand.setdefault(identity(x), torch.empty(1))

    return plain({k: instead(x) for k, x in state.items()}, **kwargs)


METHODS: dict[tuple[str, str, str], Callable[..., object]] = {
    ("transformers.modeling_utils", "PreTrainedModel", SAVE): _save_pretrained,
    ("peft.peft_model", "PeftModel", SAVE): _save_pretrained,
    ("transformers.trainer", "Trainer", "save_model"): _checkpoint("save_model"),
    ("transformers.trainer", "Trainer", "_save_checkpoint"): _checkpoint("_save_checkpoint"),
    ("accelerate.accelerator", "Accelerator", "get_state_dict"): _state_of,
    ("accelerate.accelerator", "Accelerator", "save_state"): _save_state,
    ("lightning_fabric.strategies.strategy", "Strategy", "save_checkpoint"): _fabric_save,
    ("lightning.fabric.strategies.strategy", "Strategy", "save_checkpoint"): _fabric_save,
}
FUNCTIONS: dict[tuple[str, str], Callable[..., object]] = {
    ("safetensors.torch", "_flatten_as_ptr"): _flat,
    ("safetensors.torch", "_flatten"): _flat,
    ("safetensors.torch", "serialize_file"): _to_file,
    ("safetensors.torch", "serialize"): _to_file,
    ("safetensors.torch", "_remove_duplicate_names"): _duplicates,
}
