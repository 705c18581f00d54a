"""One persistent gloo world per number of ranks: processes that run functions of the tests by
name."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

WAIT = 120.0  # seconds for another rank's compile
# processes that have imported torch, the compiler and the library of models already
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.support.preload"])


def _in_turn(rank: int, folder: str) -> Callable[[], None]:
    """Each graph and each piece is compiled on rank 0 first, so that the others find it in its
    cache; -> to be called before each task."""
    from tspc.backend import tsp as backend
    from tspc.runtime.fold import pieces

    done = [0, 0]

    def in_turn(compiler: Any) -> Any:
        def compile_graph(*args: Any, **kwargs: Any) -> Any:
            if args[-1] == "eager":  # nothing that a cache holds
                return compiler(*args, **kwargs)
            done[1] += 1
            file = os.path.join(folder, f"{done[0]}_{done[1]}")
            end = time.monotonic() + WAIT
            while rank and not os.path.exists(file) and time.monotonic() < end:
                time.sleep(0.01)
            try:
                return compiler(*args, **kwargs)
            finally:
                if not rank:
                    open(file, "w").close()

        return compile_graph

    def task() -> None:
        done[:] = [done[0] + 1, 0]

    backend.compile_local = in_turn(backend.compile_local)
    pieces.compile_fx_inner = in_turn(pieces.compile_fx_inner)
    return task


def _work(rank: int, ranks: int, folder: str, cache: str | None, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TSPC_STRICT_INTERNAL"] = "1"
    if cache is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.format(rank=rank)
    torch.set_num_threads(1)
    gc.set_threshold(50_000, 20, 20)
    store = os.path.join(folder, "store")
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{store}")
    begin = _in_turn(rank, folder)
    if os.environ.get("TESTS_BROKEN"):
        importlib.import_module("tests.house.broken").break_named(os.environ["TESTS_BROKEN"])
    while True:
        task = pipe.recv()
        if task is None:
            break
        module, name, kwargs = task
        begin()
        try:
            torch._dynamo.reset()
            pipe.send((True, getattr(importlib.import_module(module), name)(**kwargs)))
        except Exception as e:
            pipe.send((False, f"{type(e).__name__}: {e}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class World:
    """run(function, **kwargs) on every rank; the results, or an error of the first rank that
    failed.

    cache: Inductor's cache folder ("{rank}" in it: one of each rank), default its own.
    """

    def __init__(self, ranks: int, cache: str | None = None):
        self.ranks = ranks
        folder = tempfile.mkdtemp()
        self.pipes, self.processes = [], []
        for r in range(ranks):
            mine, theirs = PROCESSES.Pipe()
            args = (r, ranks, folder, cache, theirs)
            p = PROCESSES.Process(target=_work, args=args, daemon=True)
            p.start()
            self.pipes.append(mine)
            self.processes.append(p)

    def run(self, function: Any, **kwargs: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, kwargs))
        answers = [self._answer(r) for r in range(self.ranks)]
        for r, (good, value) in enumerate(answers):
            if not good:
                raise RuntimeError(f"rank {r}: {value}")
        return [value for _, value in answers]

    def _answer(self, r: int) -> tuple[bool, Any]:
        try:
            return self.pipes[r].recv() if self.pipes[r].poll(600) else (False, "timeout")
        except EOFError:
            self.processes[r].join(10)
            return False, f"its process ended with exit code {self.processes[r].exitcode}"

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for p in self.processes:
            p.join(10)
            p.kill()
