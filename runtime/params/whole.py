"""The whole state of a sharded model and its optimizer, on one rank, and back: collectives.

The ranks that share a model meet before anything is sent, so that a rank that comes alone is told
and no other collective is taken for this one. One whole tensor at a time is on a device.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from tspc.base.errors import PlanError, ShardedParameterError
from tspc.base.state import CALL, remembered
from tspc.runtime.comm.failures import Lost, failure, naming
from tspc.seams.compiler import default_store, storage_key, timeout_of
from tspc.seams.tensors import has_storage, tree_map

log = logging.getLogger("tspc")
PATIENCE = timedelta(seconds=10)  # then it is said who is waited for
_WRITING = remembered(CALL, threading.local())
_MEETINGS: Counter[str] = Counter()
Value = TypeVar("Value")
State = dict[str, Any]  # of a module or an optimizer


@dataclass(frozen=True)
class Sharers:
    """The ranks that share a model; the first of them has the whole state.

    links: for each dim of their mesh the group of this rank and who in it sends.
    """

    ranks: tuple[int, ...] = (0,)
    links: tuple[tuple[dist.ProcessGroup | None, int], ...] = ()

    @property
    def first(self) -> bool:
        return not self.links or dist.get_rank() == self.ranks[0]

    def meet(self, what: str) -> None:
        """All are here, or `RankFailureError` names who is not, within the group's timeout."""
        if len(self.ranks) == 1:
            return
        prefix = f"tspc/state/{'_'.join(map(str, self.ranks))}"
        me, count, store = dist.get_rank(), _MEETINGS[prefix], default_store()
        _MEETINGS[prefix] += 1
        limit = timeout_of(dist.group.WORLD) or timedelta(minutes=30)
        store.set(f"{prefix}/{count}/{me}", what)
        keys = [f"{prefix}/{count}/{r}" for r in self.ranks]
        try:
            self._wait(store, keys, limit, what)
        except RuntimeError as e:
            lost = Lost(e, "the other ranks: it is to be called on all of them")
            raise failure(lost, what, dist.group.WORLD) from e
        others = {r: store.get(k).decode() for r, k in zip(self.ranks, keys)}
        store.delete_key(f"{prefix}/{count - 1}/{me}")
        for r, other in others.items():
            if other != what:
                raise ShardedParameterError(
                    f"rank {me} is in {what}, rank {r} in {other}: both are to be called on all "
                    "ranks, in one order"
                )

    def _wait(self, store: Any, keys: list[str], limit: timedelta, what: str) -> None:
        try:
            store.wait(keys, min(PATIENCE, limit))
        except RuntimeError:
            if limit <= PATIENCE:
                raise
            absent = [str(r) for r, k in zip(self.ranks, keys) if not store.check([k])]
            log.warning(
                f"tspc: rank {dist.get_rank()} waits in {what}, which is to be called on all "
                f"ranks, for ranks {', '.join(absent)}"
            )
            store.wait(keys, limit - PATIENCE)

    def given(self, value: Value) -> Value:
        """The first one's value, a small object."""
        for group, source in self.links:
            box = [value]
            dist.broadcast_object_list(box, source, group)
            value = box[0]
        return value

    def send(self, x: torch.Tensor) -> None:
        """The first one's tensor, in place."""
        for group, source in self.links:
            dist.broadcast(x, source, group)


def sharers(*tensors: object) -> Sharers:
    """Those of the shards among the tensors, of the world if there are none."""
    mesh = next((x.device_mesh for x in tensors if isinstance(x, DTensor)), None)
    if mesh is None:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return Sharers()
        return Sharers(tuple(range(dist.get_world_size())), ((dist.group.WORLD, 0),))
    ranks = sorted(mesh.mesh.flatten().tolist())
    at = (mesh.mesh == ranks[0]).nonzero()[0].tolist()
    links = []
    for dim, place in enumerate(at):
        group = mesh.get_group(dim)
        links.append((group, dist.get_global_rank(group, place)))
    return Sharers(tuple(ranks), tuple(links))


def root_of(model: object, what: str) -> nn.Module:
    """The module itself where it is compiled. Raises `PlanError` for what is no module."""
    root = getattr(model, "_orig_mod", model)
    if not isinstance(root, nn.Module):
        raise PlanError(
            f"{what} takes a module, compiled or not, as its first argument and was given "
            f"{type(model).__name__}"
        )
    return root


class Gathered:
    """Whole copies on the first rank's CPU; tensors that were one stay one."""

    def __init__(self, among: Sharers):
        self.among = among
        # with what each was made of, whose memory is then nobody else's
        self.made: dict[object, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def __call__(self, x: object) -> object:
        """A tensor whole, None on the other ranks; anything else as it is."""
        if not isinstance(x, torch.Tensor):
            return x
        x = x.detach()
        key = identity(x)
        if key in self.made:
            return self.made[key][1]
        whole = x.full_tensor() if isinstance(x, DTensor) else x
        if not self.among.first:
            out = None
        elif whole.device.type != "cpu" or isinstance(x, DTensor) and not _replicated(x):
            out = whole.cpu()
        else:
            out = whole.clone()
        self.made[key] = x, out
        return out

    def known(self, x: torch.Tensor) -> torch.Tensor | None:
        """What was made of it before, on the first rank."""
        return self.made.get(identity(x), (x, None))[1]


def active() -> Gathered | None:
    """What was gathered for a library's writer that runs now (`writing`)."""
    return getattr(_WRITING, "take", None)


@contextlib.contextmanager
def shown(take: Gathered | None) -> Iterator[None]:
    """States are made of what was gathered, or of None: of what each rank has."""
    before, _WRITING.take = active(), take
    try:
        yield
    finally:
        _WRITING.take = before


def identity(x: torch.Tensor) -> object:
    """Equal for two tensors that are one, with all of its memory alike."""
    held = x._local_tensor if isinstance(x, DTensor) else x
    if not has_storage(held):
        return id(x)
    return storage_key(held), held.storage_offset(), tuple(x.shape), tuple(held.stride())


def _replicated(x: DTensor) -> bool:
    return all(isinstance(p, Replicate) for p in x.placements)


def full_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """The whole state of a model, compiled or not, sharded or not, on the CPU of the first rank;
    on the other ranks an empty dict. A collective: call it on all ranks, then save on rank 0.

    The keys and shapes are those of the plain module's `state_dict()`; one whole tensor is gathered
    at a time. With an optimizer a pair: the model's state, and the optimizer's as the
    `load_state_dict` of a plain process takes it. Raises `PlanError` for what is no model or
    optimizer, `RankFailureError` if a rank does not come.
    """
    what = "tspc.full_state_dict"
    root = root_of(model, what)
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise PlanError(f"{what}: {type(optimizer).__name__} is no optimizer")
    with torch.no_grad(), shown(None):
        among = sharers(*root.parameters())
        among.meet(what)
        take = Gathered(among)
        with naming(what, dist.group.WORLD):
            state = _gathered(root.state_dict(), take)
            if optimizer is None:
                return state
            return state, _gathered(optimizer.state_dict(), take)


def _gathered(state: Mapping[str, Any], take: Gathered) -> State:
    out = tree_map(take, dict(state))
    if not take.among.first:
        return {}
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        out = OrderedDict(out)
        vars(out)["_metadata"] = metadata
    return out


@dataclass(frozen=True)
class _Announced:
    """A tensor that the first rank is going to send."""

    shape: torch.Size
    dtype: torch.dtype


class Sent:
    """The first rank's tensors, received in order; `into` is where each is put."""

    def __init__(self, among: Sharers):
        self.among = among

    def structure(self, state: Mapping[str, Any] | None) -> State | None:
        """The state with announcements in the place of tensors; the same on all ranks."""
        announced = None
        if self.among.first:
            announced = tree_map(_announce, state)
        return self.among.given(announced)

    def take(
        self, announced: _Announced, value: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """One whole tensor. value: the first rank's, which nobody else has."""
        if self.among.first:
            assert value is not None
            value = value.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            x = value.to(device).contiguous()
        else:
            x = torch.empty(announced.shape, dtype=announced.dtype, device=device)
        if x.numel():
            self.among.send(x)
        return x


def _announce(x: object) -> object:
    return _Announced(x.shape, x.dtype) if isinstance(x, torch.Tensor) else x


def load_full_state_dict(
    model: nn.Module,
    state: Mapping[str, Any] | None,
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_state: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> Any:
    """Load a state of whole tensors, as `full_state_dict` and one device give it, into a model
    that may be sharded, and into its optimizer. A collective: call it on all ranks.

    state, and with an optimizer optimizer_state: the first rank's are taken and sent one tensor at
    a time, the others' are not looked at and may be None. Keys may have the prefix of a compiled
    module. -> what `model.load_state_dict(..., strict)` returns; raises what it raises, on all
    ranks, and `RankFailureError` if a rank does not come.
    """
    what = "tspc.load_full_state_dict"
    root = root_of(model, what)
    among = sharers(*root.parameters())
    among.meet(what)
    sent = Sent(among)
    whole_state = None
    if among.first and state is not None:
        whole_state = {k.removeprefix("_orig_mod."): v for k, v in state.items()}
    with torch.no_grad(), naming(what, dist.group.WORLD):
        announced = sent.structure(whole_state)
        if among.given((optimizer is None) != (optimizer_state is None)):
            raise PlanError(f"{what}: optimizer= and optimizer_state= go together")
        if not isinstance(announced, Mapping):
            raise PlanError(f"{what}: the first rank has no state, but {type(announced).__name__}")
        target, device = root.state_dict(), _device(root)
        ready: State = {}
        for name, x in announced.items():
            if isinstance(x, _Announced):
                whole = sent.take(x, None if whole_state is None else whole_state[name], device)
                ready[name] = fill(target.get(name), whole)
            else:
                ready[name] = x
        loaded = root.load_state_dict(ready, strict=strict)
        if optimizer is not None:
            optimizer.load_state_dict(_received(sent, optimizer, optimizer_state, device))
    return loaded


def fill(target: object, whole: torch.Tensor) -> torch.Tensor:
    """Copy into the tensor that a module holds, where there is one of that shape; -> it, to be
    given to `load_state_dict`, else the whole one."""
    if not isinstance(target, torch.Tensor) or target.shape != whole.shape or target.is_meta:
        return whole
    if isinstance(target, DTensor):
        target.to_local().copy_(cut(whole, target).to_local())
    else:
        target.copy_(whole)
    return target


def cut(whole: torch.Tensor, like: DTensor) -> DTensor:
    """Sharded alike; no communication."""
    x = whole.to(like.device_mesh.device_type)
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def _device(root: nn.Module) -> torch.device:
    """Where what is sent is received."""
    return next((p.device for p in root.parameters() if not p.is_meta), torch.device("cpu"))


def _received(
    sent: Sent,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any] | None,
    device: torch.device,
) -> State:
    """The optimizer's state, cut like the parameters."""
    announced = sent.structure(state)
    assert announced is not None
    groups = [p for g in optimizer.param_groups for p in g["params"]]
    saved = [i for g in announced["param_groups"] for i in g["params"]]
    params = dict(zip(saved, groups))
    first = sent.among.first

    def take(x: object, value: Any, p: object) -> object:
        if isinstance(x, _Announced):
            whole = sent.take(x, value, device)
            if isinstance(p, DTensor) and whole.shape == p.shape and whole.dim():
                return cut(whole, p)
            return whole if whole.dim() else whole.cpu()
        if isinstance(x, Mapping):
            return {k: take(v, value[k] if first else None, p) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return type(x)(take(v, value[i] if first else None, p) for i, v in enumerate(x))
        return x

    out = {}
    for key, x in announced.items():
        value: Any = state[key] if state is not None and first else None
        if key == "state":
            out[key] = {
                i: take(s, value[i] if first else None, params.get(i)) for i, s in x.items()
            }
        else:
            out[key] = take(x, value, None)
    return out
