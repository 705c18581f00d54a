"""The process group that a launcher (torchrun) describes in the environment, made where the
script made none."""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from tspc.base.errors import PlanError
from tspc.base.journal import note, note_once

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALONE = (
    "no process group, and no launcher's RANK and WORLD_SIZE in the environment: runs on one "
    "rank, as plain Inductor (for N ranks: torchrun --nproc-per-node=N script.py)"
)


def runs_on(device: torch.device) -> str:
    """The type of device that a model will run on: of one on meta, this machine's accelerator."""
    if device.type != "meta":
        return device.type
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator is not None else "cpu"


def join(device: torch.device) -> bool:
    """Make the default group over all launched processes; -> whether there is more than one.

    device: of the model. On an accelerator each process takes that of its LOCAL_RANK. Collective.
    Raises `PlanError` where the environment is not whole or the model is on another process's
    device.
    """
    if not dist.is_available() or not os.environ.get("WORLD_SIZE"):
        note_once(ALONE)
        return False
    if _number("WORLD_SIZE") == 1:
        return False
    missing = [n for n in NEEDED if not os.environ.get(n)]
    if missing:
        raise PlanError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} is not in the "
            "environment: launch by torchrun, or call torch.distributed.init_process_group first"
        )
    rank, ranks = _number("RANK"), _number("WORLD_SIZE")
    kind = runs_on(device)
    where = _own_device(kind, device) if kind != "cpu" else None
    backend = dist.get_default_backend_for_device(kind)
    store = _store(rank, ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, device_id=where)
    atexit.register(_leave)
    if rank == 0:
        note(
            f"no process group: made one of {ranks} ranks ({backend}) from RANK and WORLD_SIZE "
            "in the environment"
        )
    return True


def _store(rank: int, ranks: int) -> Store:
    """The launcher's, apart for each of its restarts.

    torchrun keeps one store over its restarts (torch 2.13), in which a rank that starts again may
    read where another one was before. On several nodes the restarts are counted apart, so the store
    is left as it is.
    """
    store, *_ = next(rendezvous("env://", rank, ranks))
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _own_device(kind: str, device: torch.device) -> torch.device:
    """This process's accelerator, made the current one."""
    local = os.environ.get("LOCAL_RANK") or str(_number("RANK") % torch.accelerator.device_count())
    device_here = torch.device(kind, int(local))
    if device.index not in (None, device_here.index):
        raise PlanError(
            f"the model is on {device}, the device of LOCAL_RANK {local} is {device_here}: call "
            f"torch.accelerator.set_device_index({local}) before the model is moved, or "
            f"model.to(f\"{kind}:{{os.environ['LOCAL_RANK']}}\")"
        )
    torch.accelerator.set_device_index(device_here.index)
    return device_here


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise PlanError(
            f"{name} in the environment is {os.environ[name]!r}, no number: launch by torchrun"
        ) from None


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
