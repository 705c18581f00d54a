"""What the benchmarks share: the model's sizes as arguments, one training step of a system, and a
run of a script on the ranks of one machine."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.peers import make
from examples.llama_like import LlamaLike

ROOT = Path(__file__).parent.parent
SIZES = {
    "ranks": 4,
    "hidden": 512,
    "layers": 4,
    "heads": 8,
    "kv-heads": 4,
    "ffn": 1408,
    "vocabulary": 8192,
    "batch": 1,
}


def add_sizes(parser: argparse.ArgumentParser) -> None:
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)


@dataclass
class Training:
    """A system's model on the data of all systems; call it to make a step."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss_of: Callable[[torch.Tensor], torch.Tensor]  # runs the backward too
    tokens: torch.Tensor
    losses: list[float]

    def __call__(self) -> None:
        loss = self.loss_of(self.tokens)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())


def training(args: argparse.Namespace, name: str, length: int) -> Training:
    torch.manual_seed(0)
    sizes = args.vocabulary, args.hidden, args.layers, args.heads, args.kv_heads, args.ffn
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, args.vocabulary, (args.batch, length), generator=generator)
    model, loss_of = make(name, LlamaLike(*sizes), length)
    return Training(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loss_of, tokens, [])


def work(args: argparse.Namespace, run: Callable[[argparse.Namespace], Any]) -> None:
    """In a process that `launch` started: what `run` returns on every rank goes to its file."""
    if "RANK" not in os.environ:
        Path(args.worker).write_text(json.dumps([run(args)]))
        return
    dist.init_process_group("gloo")
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, run(args))
    if dist.get_rank() == 0:
        Path(args.worker).write_text(json.dumps(everyone))
    dist.destroy_process_group()


def launch(args: argparse.Namespace, script: str, own: Sequence[str], torchrun: bool = True) -> Any:
    """Run a script in processes of its own; the results of its ranks. Raises RuntimeError if it
    fails."""
    given = [f"--{k}={getattr(args, k.replace('-', '_'))}" for k in SIZES]
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        done = subprocess.run(
            [*command, script, *own, *given, f"--worker={out.name}"],
            cwd=ROOT,
            env={"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | os.environ,
            timeout=args.timeout,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(Path(out.name).read_text())
