"""One process over several process groups: what was made over a group goes with it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from tests.support.world import PROCESSES
from tspc.base.state import MODEL, REGISTRIES
from tspc.runtime import execute
from tspc.runtime.comm import ending

pytestmark = pytest.mark.dist
STEPS = 2


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, width), nn.Linear(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def _losses(model: nn.Module, fn: Any, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = []
    for _ in range(steps):
        loss = fn(torch.ones(2, 8, 16, dtype=torch.float64)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


def _block(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return Block(width).double()


def _work(rank: int, folder: str, pipe: Any) -> None:
    """Two groups after one another; a new model over the second one, and the old one again."""
    torch.set_num_threads(1)
    found: list[Any] = []
    model, fn = None, None
    for turn in range(2):
        store = f"file://{folder}/store{turn}"
        dist.init_process_group("gloo", rank=rank, world_size=2, init_method=store)
        old, model = (model, fn), _block()
        fn = torch.compile(model, backend="tsp", options={"compiler": "eager"})
        found.append(_losses(model, fn, STEPS))
        if old[0] is not None:
            found.append(_losses(*old, STEPS))
        found.append(len(execute.PLACES))
        dist.destroy_process_group()
    pipe.send(found)


def test_a_group_that_is_destroyed_and_made_again(tmp_path: Path) -> None:
    processes, pipes = [], []
    for r in range(2):
        mine, theirs = PROCESSES.Pipe(duplex=False)
        p = PROCESSES.Process(target=_work, args=(r, str(tmp_path), theirs), daemon=True)
        p.start()
        theirs.close()
        processes.append(p)
        pipes.append(mine)
    found = [pipe.recv() if pipe.poll(200) else None for pipe in pipes]
    for p in processes:
        p.join(20)
        assert p.exitcode == 0
    model = _block()
    one = [_losses(model, model, STEPS), _losses(model, model, STEPS)]
    for first, places, again, old, still in found:
        assert first == again == pytest.approx(one[0], rel=1e-9)
        assert old == pytest.approx(one[1], rel=1e-9)
        assert places == still == 1


def outlived() -> tuple[dict[str, int], list[bool]]:
    """What twenty models leave: shards, and entries of registries; which of them are alive."""

    def sizes() -> dict[str, int]:
        torch._dynamo.reset()
        gc.collect()
        of_models = {r.module: len(r.what) for r in REGISTRIES if r.lifetime is MODEL}
        return {**of_models, "shards": sum(1 for x in gc.get_objects() if is_shard(x))}

    def is_shard(x: Any) -> bool:
        return isinstance(x, DTensor) and not isinstance(x._local_tensor, FakeTensor)

    before, models = sizes(), []
    for i in range(20):
        model = _block(32 + 16 * (i % 3))
        _losses(model, torch.compile(model, backend="tsp", options={"compiler": "eager"}), 1)
        models.append(weakref.ref(model))
    del model
    after = sizes()
    return {k: n - before.get(k, 0) for k, n in after.items()}, [m() is not None for m in models]


def test_nothing_outlives_a_model(world: Any) -> None:
    for left, alive in world(2).run(outlived):
        bodies = left.pop("tspc.ir.body")
        assert bodies <= 1  # torch keeps what it traced last
        assert len(left) > 4 and not any(left.values()), left
        assert not any(alive)


def test_what_is_held_is_kept_alive() -> None:
    x = torch.zeros(3)
    ending.hold(x, None, torch.zeros(ending.SMALL))
    assert any(t is x for t in ending._LAST)
    assert all(t.nbytes <= ending.SMALL for t in ending._LAST)
