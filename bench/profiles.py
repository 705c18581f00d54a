"""Where the time of a training step goes: CPU seconds of all ranks by what they were spent on, for
systems side by side.

`python bench/profiles.py --systems tp "tspc auto" --length 2048`. All systems live in one world and
take turns, and CPU seconds are counted instead of the clock, so that other work on the machine
disturbs little.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import shlex
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.peers import NAMES
from bench.world import add_sizes, launch, training, work
from examples.measure import peak_of, state_bytes

# the first that one of its words is in the name of the operation
CATEGORIES = {
    "matrix products": ("mm", "linear", "mkldnn"),
    "attention kernels": ("flash", "scaled_dot"),
    "fused kernels": ("cpp_fused", "kernel"),
    "optimizer": ("adam", "Optimizer"),
    "communication": ("c10d", "gloo", "all_reduce", "all_gather", "reduce_scatter", "wait_tensor"),
    "copies and sums": (
        *("copy", "clone", "cat", "contiguous", "stack", "index", "add", "sum", "zero", "fill"),
        *("mul", "where", "exp", "gather", "sub"),
    ),
}


def category(name: str) -> str:
    lowered = name.lower()
    for found, words in CATEGORIES.items():
        if any(w.lower() in lowered for w in words):
            return found
    return "Python and the rest"


def cpu_seconds() -> tuple[float, float]:
    """(of this thread, of all threads of the process), user and system."""
    of = (resource.getrusage(w) for w in (resource.RUSAGE_THREAD, resource.RUSAGE_SELF))
    mine, every = (u.ru_utime + u.ru_stime for u in of)
    return mine, every


def by_function(calls: cProfile.Profile) -> dict[str, tuple[float, int]]:
    """Function -> (CPU seconds of this thread in itself, calls)."""
    found = {}
    for (path, line, name), (_, n, own, *_) in pstats.Stats(calls).stats.items():  # pyright: ignore[reportAttributeAccessIssue]
        found[f"{'/'.join(Path(path).parts[-2:])}:{line} {name}"] = (own, n)
    return found


def run(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each system's steps took on this rank."""
    torch._inductor.config.cpp.enable_kernel_profile = True  # kernels by name
    systems = {name: training(args, name, args.length) for name in args.systems}
    found: dict[str, dict[str, Any]] = {name: {"main": [], "all": []} for name in systems}
    for turn in range(2 + args.steps):
        for name, step in systems.items():
            dist.barrier()
            before = cpu_seconds()
            step()
            main, every = (a - b for a, b in zip(cpu_seconds(), before))
            if turn > 1:
                found[name]["main"].append(main)
                found[name]["all"].append(every)
    for name, step in systems.items():
        dist.barrier()
        held = state_bytes(step.model, step.optimizer)
        peak, _, _ = peak_of(step)
        found[name]["peak"] = (held["parameters"] + held["optimizer"] + peak) / 2**20
        found[name]["losses"] = step.losses
        if args.brief:
            continue
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as p:
            step()
        found[name]["ops"] = {e.key: e.self_cpu_time_total / 1e6 for e in p.key_averages()}
        found[name]["counts"] = {e.key: e.count for e in p.key_averages()}
        dist.barrier()
        calls = cProfile.Profile(time.thread_time)
        calls.runcall(step)
        found[name]["functions"] = by_function(calls)
    return found


def summarize(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One system: CPU seconds of a step, of all ranks together (medians over the steps), and the
    first rank's self time by category."""

    def seconds(what: str) -> float:
        return statistics.median(sum(r[what][i] for r in ranks) for i in range(len(ranks[0][what])))

    ops, functions = ranks[0].get("ops", {}), ranks[0].get("functions", {})
    by: Counter[str] = Counter()
    for name, time_of in ops.items():
        by[category(name)] += time_of
    return {
        "CPU seconds": seconds("all"),
        "of it main threads": seconds("main"),
        "peak MiB": max(r["peak"] for r in ranks),
        "loss": ranks[0]["losses"][-1],
        "categories": {c: by[c] for c in (*CATEGORIES, "Python and the rest")} if ops else {},
        "ops": dict(sorted(ops.items(), key=lambda e: -e[1])),
        "counts": ranks[0].get("counts", {}),
        "functions": dict(sorted(functions.items(), key=lambda e: -e[1][0])),
    }


def table(results: dict[str, dict[str, Any]], length: int) -> Table:
    out = Table("", *results, title=f"S = {length}")
    for row, form in (
        *(("CPU seconds", "{:.2f}"), ("of it main threads", "{:.2f}")),
        *(("peak MiB", "{:.0f}"), ("loss", "{:.6f}")),
    ):
        out.add_row(row, *(form.format(r[row]) for r in results.values()))
    out.add_section()
    for c in next(iter(results.values()))["categories"]:
        out.add_row(f"rank 0, {c}", *(f"{r['categories'][c]:.3f}" for r in results.values()))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    choices = [n for n in NAMES if n != "one"]
    parser.add_argument("--systems", nargs="+", choices=choices, default=["tp", "tspc auto"])
    parser.add_argument("--length", type=int, default=2048)
    add_sizes(parser)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--brief", action="store_true", help="seconds and memory only")
    parser.add_argument("--top", type=int, default=0, help="also list this many operations")
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--out", default="", help="a folder for the numbers as JSON")
    args = parser.parse_args()
    if args.worker:
        work(args, run)
        return
    own = ["--systems", *args.systems, f"--length={args.length}", f"--steps={args.steps}"]
    ranks = launch(args, __file__, [*own, "--brief"] if args.brief else own)
    console = Console(width=100)
    results = {name: summarize([r[name] for r in ranks]) for name in args.systems}
    console.print(table(results, args.length))
    for name, r in results.items():
        for op, seconds in list(r["ops"].items())[: args.top]:
            console.print(f"{name:16} {seconds:8.3f} s {r['counts'][op]:6} x {op}", highlight=False)
        for function, (seconds, n) in list(r["functions"].items())[: args.top]:
            console.print(f"{name:16} {seconds:8.3f} s {n:6} x {function}", highlight=False)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        path = Path(args.out) / f"profile-{time.strftime('%Y%m%d-%H%M%S')}.json"
        command = shlex.join(["python", "bench/profiles.py", *sys.argv[1:]])
        path.write_text(json.dumps({"command": command, "results": results}, indent=1) + "\n")
        console.print(f"written: {path}")


if __name__ == "__main__":
    main()
