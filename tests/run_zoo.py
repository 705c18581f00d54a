"""make zoo: each model of the zoo on simulated ranks against one device, as a table."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections import Counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

import tspc
from tests.widen import Widen
from tests.zoo import ZOO, build
from tspc.report import reports


def look(name: str, ranks: int, length: int) -> dict[str, Any]:
    """Parity, regions and what runs replicated."""
    start = time.perf_counter()
    model, kwargs = build(name, length)
    row: dict[str, Any] = {"model": name, "ranks": ranks, "length": length}
    try:
        with Widen():
            found = tspc.verify(model, (), kwargs, ranks, tolerance=float("inf"))
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        text = str(e).strip().splitlines()
        row["error"] = (
            f"{type(e).__name__}: {text[0][:300] if text else ''} ({where.filename}:{where.lineno})"
        )
        return row | {"seconds": time.perf_counter() - start}
    row["worst"] = found.worst
    row["graphs"] = len(found.graphs)
    row["folds"] = [n for g in found.graphs for n, _, _ in g.rewritten.choice.regions]
    row["refused"] = [
        (".".join(sorted(r.weights)[:1]), why)
        for g in found.graphs
        for r, why in g.rewritten.choice.refused
    ]
    row["replicated"] = [str(line) for g in found.graphs for line in reports(g.rewritten)]
    kinds = Counter(s.kind for g in found.graphs for n, s in g.rewritten.choice.storages.items())
    row["storage"] = dict(kinds)
    row["seconds"] = time.perf_counter() - start
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=[])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--length", type=int, default=23)
    parser.add_argument("--out")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for name in args.models or ZOO:
        for ranks in args.ranks:
            rows.append(look(name, ranks, args.length))
            row = rows[-1]
            if "error" in row:
                print(f"{name:14} D={ranks} {row['error'][:400]}", flush=True)
                continue
            print(
                f"{name:14} D={ranks} worst {row['worst']:.1e} graphs {row['graphs']} folds "
                f"{len(row['folds'])} {row['storage']} {row['seconds']:.0f}s",
                flush=True,
            )
            for line in row["refused"]:
                print("      refused", line)
            for line in row["replicated"]:
                print("      ", line[:230])
    if args.out:
        with open(args.out, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    sys.exit(main())
