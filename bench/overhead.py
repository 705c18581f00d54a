"""What tspc costs when there is nothing to gain: CPU time of a step of a tiny model with many
parameters, beside plain torch and FSDP2 on two ranks, and on one rank beside plain Inductor.

`python bench/overhead.py --layers-of 2 13 55`: 21, 120 and 498 parameters. CPU seconds are of the
main thread, which does not count while it waits; the systems take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.world import ROOT, add_sizes, launch, work
from examples.llama_like import LlamaLike
from tspc.backend import tsp as backend
from tspc.runtime.call.inputs import Checker
from tspc.runtime.call.lookups import Indices
from tspc.runtime.params.storage import Prologue

SYSTEMS = ("plain", "fsdp2", "tspc")
PARTS = ("forward", "backward", "optimizer", "front end", "checks")
STEP = 10  # ms: the step that the share of the checks is told of
LENGTHS = (16, 24, 40)  # of one rank's graphs


class Timed:
    """CPU seconds of this thread inside of functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.thread_time()
            try:
                return fn(*args)
            finally:
                self.seconds += time.thread_time() - start

        return timed


def model_of(args: argparse.Namespace) -> LlamaLike:
    torch.manual_seed(0)
    sizes = args.vocabulary, args.hidden, args.layers, args.heads, args.kv_heads, args.ffn
    return LlamaLike(*sizes)


def compiled(name: str, model: LlamaLike, args: argparse.Namespace) -> Callable[..., Any]:
    if name == "tspc":
        return torch.compile(model, backend="tsp", options={"schedule": args.schedule})
    if name == "plain":
        return torch.compile(model)
    mesh = init_device_mesh("cpu", (args.ranks,))
    for block in model.blocks:
        block.compile()
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def on_ranks(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """System -> part of a step -> CPU seconds of each step on this rank."""
    inside, returned, checks = Timed(), Timed(), Timed()
    real = backend.compile_local
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, args.vocabulary, (args.batch, args.length), generator=generator)
    found: dict[str, dict[str, list[float]]] = {n: {p: [] for p in PARTS} for n in SYSTEMS}
    with (
        mock.patch.object(backend, "compile_local", lambda *a: inside.around(real(*a))),
        mock.patch.object(Prologue, "backward", staticmethod(returned.around(Prologue.backward))),
        mock.patch.object(Checker, "__call__", checks.around(Checker.__call__)),
        mock.patch.object(Indices, "__call__", checks.around(Indices.__call__)),
    ):
        systems = {}
        for name in SYSTEMS:
            model = model_of(args)
            fn = compiled(name, model, args)
            systems[name] = fn, torch.optim.SGD(model.parameters(), lr=1e-3)
        for turn in range(3 + args.steps):
            for name, (fn, optimizer) in systems.items():
                inside.seconds = returned.seconds = checks.seconds = 0.0
                times = [time.thread_time()]
                loss = fn(tokens, tokens)
                times.append(time.thread_time())
                loss.backward()
                times.append(time.thread_time())
                optimizer.step()
                optimizer.zero_grad()
                times.append(time.thread_time())
                parts = [b - a for a, b in zip(times, times[1:])]
                front = parts[0] - inside.seconds + returned.seconds if name == "tspc" else 0.0
                if turn > 2:
                    for part, seconds in zip(PARTS, [*parts, front, checks.seconds]):
                        found[name][part].append(seconds)
    return found


def on_one(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of plain Inductor and of tspc on one rank, in turns, and the graphs of each."""
    model = model_of(args)
    fns, graphs = {}, {}
    for name in ("plain", "tspc"):
        torch._dynamo.reset()
        counters.clear()
        mine = copy.deepcopy(model)
        fns[name] = compiled(name, mine, args)
        for length in LENGTHS:
            tokens = torch.randint(0, args.vocabulary, (args.batch, length))
            fns[name](tokens, tokens).backward()
        graphs[name] = counters["stats"]["unique_graphs"]
    tokens = torch.randint(0, args.vocabulary, (args.batch, LENGTHS[-1]))
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for turn in range(10 + 20 * args.steps):
        for name in list(fns) if turn % 2 else list(fns)[::-1]:
            start = time.perf_counter()
            fns[name](tokens, tokens).backward()
            if turn >= 10:
                seconds[name].append(time.perf_counter() - start)
    return {"graphs": graphs, "seconds": seconds}


def run(args: argparse.Namespace) -> Any:
    return on_ranks(args) if "RANK" in os.environ else on_one(args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_sizes(parser)
    parser.set_defaults(ranks=2, hidden=32, heads=4, kv_heads=2, ffn=64, vocabulary=256, layers=2)
    parser.add_argument("--layers-of", nargs="+", type=int, default=[2, 13, 55])
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--schedule", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks-only", action="store_true", help="leave out the one-rank part")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a run may take")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results"))
    args = parser.parse_args()
    if args.worker:
        work(args, run)
        return
    own = [f"--{k}={getattr(args, k)}" for k in ("length", "schedule", "steps")]
    console, results = Console(width=100), {}
    if not args.ranks_only:
        one = launch(args, __file__, own, torchrun=False)[0]
        typical = {name: statistics.median(s) for name, s in one["seconds"].items()}
        results["one rank"] = {"graphs": one["graphs"], "seconds": typical}
        console.print(
            f"one rank: tspc / plain Inductor = {typical['tspc'] / typical['plain']:.3f} (medians "
            f"of {len(one['seconds']['plain'])} paired steps), graphs {one['graphs']}"
        )
    table = Table("parameters", "system", *PARTS, title="CPU ms a step, main thread of rank 0")
    for layers in args.layers_of:
        args.layers = layers
        count = len(list(model_of(args).parameters()))
        ranks = launch(args, __file__, own)
        for name in SYSTEMS:
            row = {p: 1e3 * statistics.median(ranks[0][name][p]) for p in PARTS}
            results[f"{count} parameters, {name}"] = row
            shown = [f"{v:.1f}" for v in row.values()][:-1] + [f"{row['checks']:.2f}"]
            table.add_row(str(count), name, *(shown if name == "tspc" else [*shown[:-2], "-", "-"]))
        row = results[f"{count} parameters, tspc"]
        checks, step = row["checks"], sum(row[p] for p in ("forward", "backward", "optimizer"))
        console.print(
            f"{count} parameters: comparing inputs, ids and steps takes {checks:.2f} ms, "
            f"{checks / STEP:.1%} of a step of {STEP} ms, {checks / step:.1%} of this one"
        )
    console.print(table)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    path = Path(args.out) / f"overhead-{time.strftime('%Y%m%d-%H%M%S')}.json"
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}
    command = shlex.join(["python", "bench/overhead.py", *sys.argv[1:]])
    found = {"command": command, "machine": machine, "results": results}
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
