"""Train an unmodified Hugging Face model on 4 ranks and on one device, side by side.

    python examples/demo.py

Starts torchrun with 4 gloo ranks for the folded run, then one process for the reference, and
prints their losses, what each
rank holds, and what was sent. Everything is also written to results/demo.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from examples.measure import peak_of, state_bytes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
RANKS, STEPS, LENGTH, BATCH, SEED = 4, 32, 1024, 1, 0
MIB = 2**20


def make_model() -> Qwen3ForCausalLM:
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config)


def batches() -> list[torch.Tensor]:
    """Bytes of the Python standard library's own sources."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    need = STEPS * BATCH * LENGTH
    text = bytearray()
    for f in files:
        text += f.read_bytes()
        if len(text) >= need:
            break
    data = torch.frombuffer(bytearray(text[:need]), dtype=torch.uint8).long()
    return list(data.view(STEPS, BATCH, LENGTH))


def train(out: Path) -> None:
    """One run; under torchrun the model is compiled with tspc."""
    folded = "RANK" in os.environ
    if folded:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if folded else 0
    model = make_model()
    fn = torch.compile(model, backend="tsp") if folded else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, sent, start, first = [], Counter(), time.time(), 0.0
    title = f"{dist.get_world_size()} ranks" if folded else "one process"
    data = batches()
    for i in track(range(STEPS), title, disable=rank != 0, console=Console(stderr=True)):
        tokens = data[i]

        def step(tokens: torch.Tensor = tokens) -> torch.Tensor:
            loss = fn(input_ids=tokens, labels=tokens).loss
            loss.backward()
            return loss.detach()

        if i == STEPS - 1:
            peak, loss, sent = measured(step, folded)
        else:
            loss = step()
        losses.append(float(loss))
        if i < STEPS - 1:
            optimizer.step()
            optimizer.zero_grad()
        first = first or time.time() - start
    report = {
        **state_bytes(model, optimizer),
        "peak activations": peak,
        "losses": losses,
        "sent": dict(sent),
        "seconds": time.time() - start,
        "first step": first,
    }
    if folded:
        import tspc

        reports: list = [None] * dist.get_world_size()
        dist.all_gather_object(reports, report)
        if rank == 0:
            (out.parent / "demo_program.txt").write_text(tspc.explain(fn) + "\n")
            out.write_text(json.dumps(reports))
        dist.destroy_process_group()
    else:
        out.write_text(json.dumps([report]))


def measured(step, folded: bool) -> tuple[int, torch.Tensor, Counter]:
    """A step with its peak of allocated bytes and, with tspc, its bytes sent by kind."""
    sent: Counter = Counter()
    if not folded:
        peak, _, loss = peak_of(step)
        return peak, loss, sent
    from tspc.runtime.comm.drivers import record

    with record() as requests:
        peak, _, loss = peak_of(step)
    for r in requests:
        sent[r.kind] += int(r.elements * r.dtype.itemsize)
    return peak, loss, sent


def launch(name: str, command: list[str]) -> list[dict]:
    out = RESULTS / f"demo_{name}.json"
    subprocess.run([*command, __file__, str(out)], check=True, cwd=ROOT)
    return json.loads(out.read_text())


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
    ranks = launch("ranks", [*torchrun, "--standalone"])
    (one,) = launch("one", [sys.executable])
    console = Console()
    losses = Table("step", "one process", f"{RANKS} ranks", "relative difference", title="Losses")
    differences = []
    for i, (a, b) in enumerate(zip(one["losses"], ranks[0]["losses"])):
        differences.append(abs(a - b) / abs(a))
        if i % 4 == 0 or i == STEPS - 1:
            losses.add_row(str(i), f"{a:.6f}", f"{b:.6f}", f"{differences[-1]:.1e}")
    console.print(losses)
    console.print(f"largest relative difference of a loss: {max(differences):.1e}")
    kinds = ("parameters", "gradients", "optimizer", "peak activations")
    table = Table("MiB", *kinds, title="What each process holds (MiB = 2^20 bytes)")
    table.add_row("one process", *(f"{one[k] / MIB:.2f}" for k in kinds))
    for r, report in enumerate(ranks):
        cells = (f"{report[k] / MIB:.2f} ({report[k] / one[k]:.3f})" for k in kinds)
        table.add_row(f"rank {r}", *cells)
    console.print(table)
    traffic = Table("collective", "MiB sent per rank and step")
    for kind, count in ranks[0]["sent"].items():
        traffic.add_row(kind, f"{count / MIB:.2f}")
    console.print(traffic)
    result = {
        "model": "Qwen3ForCausalLM, 4 layers, hidden 256, heads 8/4, sequence 1024",
        "ranks": RANKS,
        "steps": STEPS,
        "largest_relative_difference": max(differences),
        "one_process": one,
        "per_rank": ranks,
        "program": "results/demo_program.txt",
    }
    (RESULTS / "demo.json").write_text(json.dumps(result, indent=1))
    console.print("the rewritten program: results/demo_program.txt")
    console.print_json(json.dumps({k: v for k, v in result.items() if k[:3] not in ("one", "per")}))
    console.print("all of it: results/demo.json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?", help="run here and write a report")
    given = parser.parse_args()
    train(given.out) if given.out else main()
