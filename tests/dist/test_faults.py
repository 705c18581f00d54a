"""A rank that raises, is interrupted, is killed or goes elsewhere: real processes, the others end
within the group's timeout and say where they waited and for whom."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from tests.support.models import VOCABULARY, make, tokens_of
from tests.support.world import PROCESSES
from tspc.runtime.comm import failures
from tspc.runtime.fold.travel import Gradients, Weights

pytestmark = pytest.mark.dist
TIMEOUT = 5.0  # seconds of the process group
SLACK = 5.0  # to end on a loaded machine
EAGER = {"compiler": "eager", "schedule": "ring"}


def _work(rank: int, ranks: int, store: str, scenario: Callable[[int], None], pipe: Any) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=ranks,
        init_method=f"file://{store}",
        timeout=timedelta(seconds=TIMEOUT),
    )
    try:
        scenario(rank)
        pipe.send(("", "", time.monotonic()))
    except BaseException as e:
        pipe.send((type(e).__name__, str(e), time.monotonic()))


def ends(ranks: int, scenario: Callable[[int], None], folder: Path) -> list[tuple[str, str, float]]:
    """How each rank ends: (error, message, when); "killed" for one that does not say."""
    processes, pipes = [], []
    for r in range(ranks):
        mine, theirs = PROCESSES.Pipe(duplex=False)
        args = (r, ranks, str(folder / "store"), scenario, theirs)
        p = PROCESSES.Process(target=_work, args=args, daemon=True)
        p.start()
        theirs.close()
        processes.append(p)
        pipes.append(mine)
    found = []
    for pipe in pipes:
        try:
            found.append(pipe.recv() if pipe.poll(90) else ("hangs", "", 0.0))
        except EOFError:
            found.append(("killed", "", 0.0))
    for p in processes:
        p.kill()
        p.join()
    return found


def train(rank: int, batches: Iterator[torch.Tensor]) -> None:
    fn = torch.compile(make("llama_like", layers=1).float(), backend="tsp", options=EAGER)
    for tokens in batches:
        fn(tokens, tokens).backward()


def broken_loader(rank: int) -> None:
    def batches() -> Iterator[torch.Tensor]:
        yield tokens_of(8)
        if rank == 1:
            raise ValueError("no such file")
        yield tokens_of(8)

    train(rank, batches())


def test_an_exception_in_a_data_loader(tmp_path: Path) -> None:
    waiting, faulty = ends(2, broken_loader, tmp_path)
    assert faulty[:2] == ("ValueError", "no such file")
    assert waiting[0] == "RankFailureError"
    assert re.search(
        r"^rank 0 waited in the check that starts a call or a compile for AllReduce of checks, "
        r"which failed \(.*\); missing: rank 1. Do this: read the log of a missing rank first",
        waiting[1],
    ), waiting[1]
    assert waiting[2] - faulty[2] < TIMEOUT + failures.GRACE + SLACK


def killed_in_a_region(rank: int) -> None:
    real = Weights.next

    def next_shard(self: Weights) -> Any:
        if rank == 2 and self.call.body.name == "blocks.0.mlp" and self.turn == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return (yield from real(self))

    Weights.next = next_shard
    train(rank, iter([tokens_of(8)]))


def test_a_kill_inside_of_a_region(tmp_path: Path) -> None:
    """Rank 0 gets its shards from rank 2."""
    first, second, killed = ends(3, killed_in_a_region, tmp_path)
    assert killed[0] == "killed" and first[0] == second[0] == "RankFailureError"
    assert re.search(
        r"^rank 0 waited in tspc::fold, region 'blocks.0.mlp' \(ring, step [23] of 3\) for Shift "
        r"of weights, which failed \(.*\); missing: rank 2[;.]",
        first[1],
    ), first[1]
    assert re.search(r"missing: rank 2|rank 0 waits in tspc::fold, region", second[1]), second[1]


def interrupted_in_a_backward(rank: int) -> None:
    real = Gradients.put

    def put(self: Gradients, j: int, grads: Any) -> Any:
        if rank == 1 and self.call.body.name == "blocks.0.mlp":
            os.kill(os.getpid(), signal.SIGINT)
        yield from real(self, j, grads)

    Gradients.put = put
    train(rank, iter([tokens_of(8)]))


def test_ctrl_c_in_a_backward(tmp_path: Path) -> None:
    waiting, faulty = ends(2, interrupted_in_a_backward, tmp_path)
    assert faulty[0] == "KeyboardInterrupt"
    assert waiting[0] == "RankFailureError"
    assert re.search(
        r"rank 0 waited in tspc::fold_backward, region 'blocks.0.mlp' \(ring, step 2 of 2\) for "
        r"Shift of weights, .*missing: rank 1",
        waiting[1],
    ), waiting[1]
    assert waiting[2] - faulty[2] < TIMEOUT + failures.GRACE + SLACK


class Both(nn.Module):
    """A loss and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(self.embedding(tokens))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), logits


def logits_on_one(rank: int) -> None:
    fn = torch.compile(Both(), backend="tsp", options=EAGER)
    for _ in range(2):
        loss, logits = fn(tokens_of(8))
        loss.backward()
        if rank == 0:
            print(logits.argmax(-1))


def test_a_deferred_output_that_one_rank_reads(tmp_path: Path) -> None:
    reads, goes_on = ends(2, logits_on_one, tmp_path)
    assert reads[0] == goes_on[0] == "RankFailureError"
    assert re.search(
        r"^test_faults.py:\d+ reads an output of the compiled model that is deferred, "
        r"float32\[2, 8, 187\]: that is a collective; read it on all ranks, or .*\"full\"} or "
        r"\"sharded\". rank 0 waited in the read of a deferred output for AllGather of outputs",
        reads[1],
    ), reads[1]
    assert "rank 1 waits in the check that starts a call" in reads[1], reads[1]
    assert "rank 1 waited in the check that starts a call" in goes_on[1], goes_on[1]
    assert "rank 0 waits in the read of a deferred output" in goes_on[1], goes_on[1]
