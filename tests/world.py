"""One persistent gloo world per number of ranks: processes that run functions of the tests by
name."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import traceback
from typing import Any

import torch
import torch.distributed as dist


def _work(rank: int, ranks: int, store: str, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{store}")
    while True:
        task = pipe.recv()
        if task is None:
            break
        module, name, kwargs = task
        try:
            torch._dynamo.reset()
            pipe.send((True, getattr(importlib.import_module(module), name)(**kwargs)))
        except Exception as e:
            pipe.send((False, f"{type(e).__name__}: {e}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class World:
    """run(function, **kwargs) on every rank; the results, or an error of the first rank that
    failed."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        context = multiprocessing.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(), "store")
        self.pipes, self.processes = [], []
        for r in range(ranks):
            mine, theirs = context.Pipe()
            p = context.Process(target=_work, args=(r, ranks, store, theirs), daemon=True)
            p.start()
            self.pipes.append(mine)
            self.processes.append(p)

    def run(self, function: Any, **kwargs: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, kwargs))
        answers = [pipe.recv() if pipe.poll(600) else (False, "timeout") for pipe in self.pipes]
        for r, (good, value) in enumerate(answers):
            if not good:
                raise RuntimeError(f"rank {r}: {value}")
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for p in self.processes:
            p.join(10)
            p.kill()
