"""The shortest training script: torchrun --nproc-per-node 4 -m examples.train (or with one process, without torchrun)."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from examples.llama_like import LlamaLike


def main(steps: int = 10) -> list[float]:
    """Losses of a few steps on repeating tokens; every rank passes the same, full batch."""
    torch.manual_seed(0)
    model = LlamaLike()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compiled = torch.compile(model, backend="tsp")
    tokens = (torch.arange(130) * 7 % 256).repeat(2, 1)
    losses = []
    for _ in range(steps):
        loss = compiled(tokens, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    losses = main()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*(f"{x:.4f}" for x in losses))
    if dist.is_initialized():
        dist.destroy_process_group()
