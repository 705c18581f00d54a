"""make demo: an untouched Hugging Face Qwen3 learns Python's own sources on 4 ranks, beside one process of the same seed.

`python -m examples.demo` runs the single process, then torchrun, then prints the tables; results/ has all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tspc.runtime.drivers import record

import tspc
from examples.measure import allocations, state_bytes

ROOT = Path(__file__).parent.parent
RANKS, EVERY = 4, 5
KINDS = ("parameters", "gradients", "optimizer", "peak activations")


def corpus() -> torch.Tensor:
    """The bytes of the standard library's modules, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def batches(args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Random windows of the text, the same on every rank: int64 [batch, length]."""
    text, generator = corpus(), torch.Generator().manual_seed(args.seed)
    while True:
        starts = torch.randint(0, len(text) - args.length, (args.batch,), generator=generator)
        yield torch.stack([text[s : s + args.length] for s in starts.tolist()]).long()


def make_model(args: argparse.Namespace) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(args.seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=256,
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=args.hidden // 8,
        )
    )


def train(args: argparse.Namespace, backend: str, expected: list[float]) -> dict[str, Any]:
    """AdamW steps with clipped gradients; then one more forward and backward, measured."""
    model = make_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compiled = torch.compile(model, backend=backend)
    first = not dist.is_initialized() or dist.get_rank() == 0
    console = Console(quiet=not first)
    losses, seconds, data = [], [], batches(args)
    with Progress(console=console) as progress:
        name = "one process" if backend == "inductor" else f"{dist.get_world_size()} ranks"
        task = progress.add_task(name, total=args.steps)
        for step in range(args.steps):
            start, tokens = time.perf_counter(), next(data)
            loss = compiled(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            progress.advance(task)
            if step % EVERY == 0 or step == args.steps - 1:
                beside = f", one process {expected[step]:.6f}" if expected else ""
                progress.console.print(f"step {step:3d}  loss {losses[-1]:.6f}{beside}")
    measured = measure_step(compiled, model, optimizer, next(data))
    program = "" if backend == "inductor" else tspc.explain(compiled)
    return {"losses": losses, "seconds": seconds, "program": program, **measured}


def measure_step(
    compiled: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor
) -> dict[str, Any]:
    """Bytes of one forward and backward; gradients are allocated before, so they are not activations."""
    optimizer.zero_grad(set_to_none=False)
    with sent() as by_kind:
        with allocations() as forward:
            out = compiled(input_ids=tokens, labels=tokens)
            loss = out.loss
        with allocations() as backward:
            loss.backward()
    held = state_bytes(model, optimizer)
    held["saved for backward"] = forward.alive
    held["peak activations"] = max(forward.peak, forward.alive + backward.peak)
    return {"bytes": held, "sent": by_kind}


@contextlib.contextmanager
def sent() -> Iterator[dict[str, int]]:
    """Payload bytes that leave a rank, by kind of communication, on average over the ranks."""
    by_kind: dict[str, float] = defaultdict(float)
    result: dict[str, int] = {}
    with record() as communications:
        yield result
    for c in communications:
        by_kind[c.kind] += c.elements * c.dtype.itemsize
    result.update((k, round(v)) for k, v in sorted(by_kind.items()))


def work(args: argparse.Namespace) -> None:
    """One process of either run: writes what it saw."""
    out = Path(args.out)
    if "RANK" not in os.environ:
        (out / "single.json").write_text(json.dumps(train(args, "inductor", [])))
        return
    dist.init_process_group("gloo")
    expected = json.loads((out / "single.json").read_text())["losses"]
    found = train(args, "tsp", expected)
    program = found.pop("program")
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        (out / "demo_program.txt").write_text(program + "\n")
        (out / "ranks.json").write_text(json.dumps(everyone))
    dist.destroy_process_group()


def launch(args: argparse.Namespace, ranks: int) -> None:
    """Run this module again: alone, or under torchrun."""
    given = [f"--{k}={v}" for k, v in vars(args).items() if k != "worker"]
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m"]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    subprocess.run(
        [*command, "examples.demo", "--worker", *given], cwd=ROOT, env=environment, check=True
    )


def report(out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Print the tables and write demo.json."""
    one = json.loads((out / "single.json").read_text())
    ranks = json.loads((out / "ranks.json").read_text())
    console = Console()
    pairs = list(zip(one["losses"], ranks[0]["losses"]))
    losses = Table("step", "one process", f"{RANKS} ranks", "relative difference", title="Losses")
    for step, (a, b) in enumerate(pairs):
        if step % EVERY == 0 or step == len(pairs) - 1:
            losses.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{abs(b - a) / abs(a):.1e}")
    largest = max(abs(b - a) / abs(a) for a, b in pairs)
    console.print(losses)
    console.print(f"largest relative difference of {len(pairs)} losses: {largest:.2e}")

    memory = Table("MiB", *KINDS, title="Memory (activations: allocator, in forward and backward)")
    rows = [("one process", one), *((f"rank {r}", x) for r, x in enumerate(ranks))]
    for name, x in rows:
        ratios = [x["bytes"][k] / one["bytes"][k] for k in KINDS]
        cells = [f"{x['bytes'][k] / 2**20:.2f} ({q:.3f})" for k, q in zip(KINDS, ratios)]
        memory.add_row(name, *cells)
    console.print(memory)

    traffic = Table("kind", "MiB sent by a rank, one step", title="Communication")
    for kind, n in ranks[0]["sent"].items():
        traffic.add_row(kind, f"{n / 2**20:.2f}")
    console.print(traffic)
    result = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("worker", "out")},
        "losses": {"one": one["losses"], "ranks": ranks[0]["losses"]},
        "largest relative difference": largest,
        "bytes": {"one": one["bytes"], "ranks": [r["bytes"] for r in ranks]},
        "ratio": [{k: r["bytes"][k] / n for k, n in one["bytes"].items()} for r in ranks],
        "sent": [r["sent"] for r in ranks],
        "seconds": {"one": one["seconds"], "ranks": ranks[0]["seconds"]},
        "program": str(out / "demo_program.txt"),
    }
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"rewritten program: {out / 'demo_program.txt'}\nall of it: {out / 'demo.json'}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(ROOT / "results"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    Path(args.out).mkdir(parents=True, exist_ok=True)
    launch(args, 1)
    launch(args, RANKS)
    report(Path(args.out), args)


if __name__ == "__main__":
    main()
