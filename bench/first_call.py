"""CPU seconds of the first call's front end on two ranks: of tracing, analysis and rewriting, of
Dynamo itself, and of lowering to graphs; Inductor is left out.

`python bench/first_call.py --layers-of 4 8 --against PATH`: beside another checkout in the same
run, in turns, with ratios. A worker runs in its checkout with nothing of this one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORKER = """
import importlib, json, sys, time
import torch
import torch.distributed as dist

torch.set_num_threads(1)
layers, out = int(sys.argv[1]), sys.argv[2]
import tspc
from examples.llama_like import LlamaLike

try:
    backend = importlib.import_module("tspc.backend.tsp")
except ImportError:
    backend = importlib.import_module("tspc.backend")
seconds = {}

def timed(name):
    fn = getattr(backend, name)

    def run(*args, **kwargs):
        start = time.thread_time()
        try:
            return fn(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.thread_time() - start

    setattr(backend, name, run)

for name in ("capture", "compile_local"):
    timed(name)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = LlamaLike(512, 64, layers, 4, 2, 128)
tokens = torch.randint(0, 512, (2, 48))
fn = torch.compile(model, backend="tsp", options={"compiler": "eager"})
start = time.thread_time()
loss = fn(tokens, tokens)
seconds["first call"] = time.thread_time() - start
loss.backward()
if dist.get_rank() == 0:
    open(out, "w").write(json.dumps(seconds))
dist.destroy_process_group()
"""


def first_call(checkout: Path, layers: int) -> dict[str, float]:
    """Of rank 0, by part."""
    with tempfile.TemporaryDirectory() as folder:
        script, out = Path(folder, "worker.py"), Path(folder, "out.json")
        script.write_text(WORKER)
        env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", str(script), str(layers), str(out)]
        subprocess.run(command, cwd=checkout, env=env, check=True, capture_output=True)
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers-of", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    checkouts = {"here": ROOT} | ({"there": args.against.resolve()} if args.against else {})
    rows = []
    for layers in args.layers_of:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
        for _ in range(args.rounds):
            for name, path in checkouts.items():
                runs[name].append(first_call(path, layers))
        for part in runs["here"][0]:
            medians = {n: statistics.median(r[part] for r in rs) for n, rs in runs.items()}
            row = {"layers": layers, "part": part}
            row |= {n: round(s, 2) for n, s in medians.items()}
            if "there" in medians:
                row["ratio"] = round(medians["here"] / medians["there"], 2)
            rows.append(row)
            print(row, flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
