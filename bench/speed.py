"""make bench: tokens/s, memory and bytes sent of tspc beside its peers on the ranks of one
machine, as one table.

`python bench/speed.py --systems "tspc auto" tp --lengths 2048` runs a part of it; every run is its
own torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import wire
from bench.peers import NAMES
from bench.world import ROOT, add_sizes, launch, training, work
from examples.measure import peak_of, state_bytes

LONG = 4096  # tokens beyond which two timed steps are enough
COLUMNS = ("tokens/s", "peak MiB", "sent MiB", "compile s", "loss difference")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One system at one length on this rank: losses, seconds of each step, bytes."""
    step = training(args, args.systems[0], args.lengths[0])
    seconds, sent, peak = [], [], 0
    # the first two compile; the second, with the optimizer's state there, tells the memory
    for turn in range(2 + args.steps):
        if dist.is_initialized():
            dist.barrier()
        before, start = wire.sent(), time.perf_counter()
        if turn == 1:
            peak, _, _ = peak_of(step)
        else:
            step()
        seconds.append(time.perf_counter() - start)
        after = wire.sent()
        sent.append(None if before is None or after is None else after - before)
    held = state_bytes(step.model, step.optimizer)
    return {
        "losses": step.losses,
        "seconds": seconds,
        "peak": held["parameters"] + held["optimizer"] + peak,
        "sent": sent[-1],
    }


def summarize(ranks: list[dict[str, Any]], tokens: int, one: list[float] | None) -> dict[str, Any]:
    """Medians over the timed steps of the slowest rank; memory of the fullest rank; bytes averaged
    over ranks."""
    timed = [max(r["seconds"][i] for r in ranks) for i in range(len(ranks[0]["seconds"]))]
    typical = statistics.median(timed[2:])
    sent = [r["sent"] for r in ranks if r["sent"] is not None]
    losses = ranks[0]["losses"]
    difference = None if one is None else max(abs(a - b) / abs(b) for a, b in zip(losses, one))
    return {
        "tokens/s": tokens / typical,
        "peak MiB": max(r["peak"] for r in ranks) / 2**20,
        "sent MiB": statistics.mean(sent) / 2**20 if sent else None,
        "compile s": sum(timed[:2]) - 2 * typical,
        "loss difference": difference,
        "losses": losses,
        "seconds": timed,
    }


def table(results: dict[str, dict[str, Any]], length: int) -> Table:
    out = Table("system", *COLUMNS, title=f"S = {length}")
    formats = ("{:.0f}", "{:.0f}", "{:.1f}", "{:.0f}", "{:.1e}")
    for name, row in results.items():
        if "error" in row:
            out.add_row(name, row["error"].strip().splitlines()[-1][:60])
            continue
        cells = [f.format(row[c]) if row[c] is not None else "-" for f, c in zip(formats, COLUMNS)]
        out.add_row(name, *cells)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192])
    add_sizes(parser)
    parser.add_argument("--steps", type=int, default=3, help="timed; at most 2 of a long sequence")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds a run may take")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results"))
    args = parser.parse_args()
    if args.worker:
        work(args, run)
        return
    console, everything = Console(width=100), {}
    for length in args.lengths:
        results: dict[str, dict[str, Any]] = {}
        one = None
        for name in args.systems:
            try:
                steps = args.steps if length <= LONG else min(args.steps, 2)
                own = [f"--systems={name}", f"--lengths={length}", f"--steps={steps}"]
                ranks = launch(args, __file__, own, torchrun=name != "one")
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                results[name] = {"error": str(error)}
            else:
                one = ranks[0]["losses"] if name == "one" else one
                results[name] = summarize(ranks, args.batch * length, one)
            console.print(name, {k: results[name].get(k) for k in (*COLUMNS, "error")})
        console.print(table(results, length))
        everything[str(length)] = results
    Path(args.out).mkdir(parents=True, exist_ok=True)
    path = Path(args.out) / f"speed-{time.strftime('%Y%m%d-%H%M%S')}.json"
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}
    command = shlex.join(["python", "bench/speed.py", *sys.argv[1:]])
    found = {"command": command, "machine": machine, "settings": vars(args), "results": everything}
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
