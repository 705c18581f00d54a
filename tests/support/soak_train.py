"""A training script that may be killed at any moment: what `make soak` runs under torchrun's own
restarts. Every step is saved by torch.distributed.checkpoint before the next one starts.

python -m torch.distributed.run ... tests/support/soak_train.py FOLDER STEPS
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

sys.path.insert(0, str(Path(__file__).parents[2]))
from examples.gpt2_like import GPT2Like

KEPT = 3  # checkpoints


def checkpoints(folder: Path) -> list[Path]:
    """Those that are whole, oldest first: a folder gets its name when all of it is written."""
    return sorted(folder.glob("step_*"))


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    unnamed = folder / "unnamed"
    if dist.get_rank() == 0:
        shutil.rmtree(unnamed, ignore_errors=True)
    dist.barrier()
    dcp.save(state, checkpoint_id=str(unnamed))
    if dist.get_rank() == 0:
        unnamed.rename(folder / f"step_{step:06d}")
        for old in checkpoints(folder)[:-KEPT]:
            shutil.rmtree(old)
    dist.barrier()


def main(folder: Path, steps: int) -> None:
    torch.manual_seed(0)
    model = GPT2Like(61, 16, 1, 2, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compiled = torch.compile(model, backend="tsp", options={"compiler": os.environ["COMPILER"]})
    tokens = torch.zeros(2, 7, dtype=torch.long)
    compiled(tokens, tokens).backward()  # the parameters are shards from here on
    optimizer.zero_grad()
    first = 0
    found = checkpoints(folder)
    if found:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        dcp.load(state, checkpoint_id=str(found[-1]))
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        first = int(found[-1].name.split("_")[1]) + 1
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 61, (2, 5 + step % 6), generator=generator)
        loss = compiled(tokens, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            with (folder / "curve.jsonl").open("a") as f:
                f.write(json.dumps([step, float(loss).hex()]) + "\n")
        save(folder, step, dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
