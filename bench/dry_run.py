"""A training step of the paper's model (hidden 4096, 32 layers and heads, ffn 16384, vocabulary
32000, bf16, AdamW, loss inside) by `plan.dry_run`: one rank's peak, traffic and FLOPs at a length,
with all activations kept and with the least, and how long the dry run took.

`python bench/dry_run.py --length 131072 --ranks 8 --device cuda`. Nothing is computed; MiB = 2^20
bytes.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

import tspc
from examples.llama_like import LlamaLike


def measured(args: argparse.Namespace, budget: str) -> dict[str, Any]:
    with torch.device("meta"):
        model = LlamaLike(32000, 4096, args.layers, 32, 32, 16384).bfloat16()
        tokens = torch.zeros(1, args.length, dtype=torch.long)
    start = time.perf_counter()
    options = {"memory_budget": budget}
    plan = tspc.plan(model, (tokens, tokens), ranks=args.ranks, options=options)
    planned = time.perf_counter()
    run = plan.dry_run(args.device)
    return {
        "budget": budget,
        "layers": args.layers,
        "length": args.length,
        "ranks": args.ranks,
        "peak GiB": round(run.peak / 2**30, 1),
        "at": run.at,
        "memory MiB": {k: round(n / 2**20) for k, n in run.memory.items()},
        "sent GiB": round(sum(run.traffic.values()) / 2**30, 1),
        "PFLOP": round(run.flops / 1e15, 2),
        "kernels": run.kernels,
        "waits": run.waits,
        "plan s": round(planned - start, 1),
        "dry run s": round(time.perf_counter() - planned, 1),
        "process MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budgets", nargs="+", default=["max-speed", "min"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for budget in args.budgets:
        rows.append(measured(args, budget))
        print(json.dumps(rows[-1], indent=1), flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
