"""The whole of what tspc asks of a training script: torchrun --nproc-per-node=4
examples/train.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
from examples.llama_like import LlamaLike


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = LlamaLike()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compiled = torch.compile(model, backend="tsp")
    for step in range(10):
        generator = torch.Generator().manual_seed(step)  # every rank passes the same batch
        tokens = torch.randint(0, 256, (2, 128), generator=generator)
        loss = compiled(tokens, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(step, float(loss))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
