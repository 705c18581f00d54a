"""How each system trains `examples.llama_like.LlamaLike` on the same ranks: a step function by the
system's name.

Every peer is written as its own documentation has it, and compiled. A step takes the full batch
and returns the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from examples.llama_like import Attention, LlamaLike, rotate

Step = Callable[[Tensor], Tensor]
SCHEDULES = ("auto", "ring", "broadcast", "gather", "stationary")
NAMES = ("one", *(f"tspc {s}" for s in SCHEDULES), "tp", "tp+sp", "fsdp2+cp")


def make(name: str, model: LlamaLike, length: int) -> tuple[nn.Module, Step]:
    """-> (the module whose parameters are trained, its forward and backward on a full batch)."""
    if name == "one":
        return model, forward_backward(torch.compile(model))
    if name.startswith("tspc "):
        options = {"schedule": name.removeprefix("tspc ")}
        return model, forward_backward(torch.compile(model, backend="tsp", options=options))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(name.split("+")[0],))
    if name == "fsdp2+cp":
        return context_parallel(model, mesh, length)
    return tensor_parallel(model, mesh, sequence=name == "tp+sp")


def forward_backward(compiled: Callable[[Tensor, Tensor], Tensor]) -> Step:
    def step(tokens: Tensor) -> Tensor:
        loss = compiled(tokens, tokens)
        loss.backward()
        return loss.detach()

    return step


def tensor_parallel(model: LlamaLike, mesh: DeviceMesh, sequence: bool) -> tuple[nn.Module, Step]:
    """Megatron's cut by `parallelize_module`; sequence: norms and residuals on 1/D of the
    tokens."""
    outside = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=outside),
        "head": ColwiseParallel(input_layouts=outside, use_local_output=False),
    }
    if sequence:
        plan["norm"] = SequenceParallel()
    parallelize_module(model, mesh, plan)
    for block in model.blocks:
        heads = {n: ColwiseParallel() for n in ("q", "k", "v")}
        inner: dict[str, ParallelStyle] = {
            **{f"attention.{n}": style for n, style in heads.items()},
            "attention.o": RowwiseParallel(output_layouts=outside),
            "mlp.gate": ColwiseParallel(),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(output_layouts=outside),
        }
        if sequence:
            whole = Replicate()
            inner |= {
                "norm1": SequenceParallel(),
                "norm2": SequenceParallel(),
                "attention": PrepareModuleInput(
                    input_layouts=(Shard(1), None, None), desired_input_layouts=(whole, None, None)
                ),
                "mlp": PrepareModuleInput(
                    input_layouts=(Shard(1),), desired_input_layouts=(whole,)
                ),
            }
        parallelize_module(block, mesh, inner)
    step = forward_backward(torch.compile(model))

    def vocabulary_parallel(tokens: Tensor) -> Tensor:
        with loss_parallel():
            return step(tokens)

    return model, vocabulary_parallel


class GatheredAttention(Attention):
    """Causal attention of this rank's zigzag chunks against K and V gathered over the sequence."""

    mesh: DeviceMesh

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            w(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
            for w in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        ranks, rank = self.mesh.size(), self.mesh.get_local_rank()
        both = all_gather_tensor_autograd(torch.stack([k, v]).contiguous(), 3, self.mesh)
        chunks = both.chunk(2 * ranks, 3)
        order = [c for r in range(ranks) for c in (r, 2 * ranks - 1 - r)]
        both = torch.cat([chunks[order.index(c)] for c in range(2 * ranks)], 3)
        rows, parts = x.shape[1] // 2, []
        for part, chunk in zip(q.chunk(2, 2), (rank, 2 * ranks - 1 - rank)):
            end = (chunk + 1) * rows
            mask = torch.ones(rows, end, dtype=torch.bool, device=x.device).tril(end - rows)
            keys, values = both[0, :, :, :end], both[1, :, :, :end]
            parts.append(F.scaled_dot_product_attention(part, keys, values, mask, enable_gqa=True))
        return self.o(torch.cat(parts, 2).transpose(1, 2).flatten(2))


def context_parallel(model: LlamaLike, mesh: DeviceMesh, length: int) -> tuple[nn.Module, Step]:
    """FSDP2 over the ranks, each on its own zigzag chunks of the tokens."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    assert length % (2 * ranks) == 0
    for block in model.blocks:
        block.attention.__class__ = GatheredAttention
        block.attention.mesh = mesh
        block.compile()
        fully_shard(block, mesh=mesh)
    trained = Chunked(model)
    trained.tail.compile()
    for part in (trained.embedding, trained.tail, trained):
        fully_shard(part, mesh=mesh)
    chunks = torch.arange(length).chunk(2 * ranks)
    mine = torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])

    def step(tokens: Tensor) -> Tensor:
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        angles = torch.outer(mine.to(model.frequencies.dtype), model.frequencies).repeat(1, 2)
        total = trained(tokens[:, mine], targets[:, mine], angles.cos(), angles.sin())
        # fully_shard averages over the ranks, the loss is a sum over them
        share = total / (targets != -100).sum()
        (share * ranks).backward()
        loss = share.detach().clone()
        dist.all_reduce(loss)
        return loss

    return trained, step


class Chunked(nn.Module):
    """The model on this rank's tokens: -> their summed loss."""

    def __init__(self, model: LlamaLike):
        super().__init__()
        self.embedding, self.blocks, self.tail = model.embedding, model.blocks, Tail(model)

    def forward(self, tokens: Tensor, targets: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.tail(x, targets)


class Tail(nn.Module):
    """Last norm, head, and the summed loss of this rank's tokens."""

    def __init__(self, model: LlamaLike):
        super().__init__()
        self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.norm(x)).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum")
