"""Lightning Fabric: data, clipping, logging, a checkpoint and resuming from it.

`torchrun --nproc-per-node 2 fabric.py --tsp`, or `python fabric.py`
"""

import argparse
import json
import os

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import tspc

parser = argparse.ArgumentParser()
parser.add_argument("--tsp", action="store_true")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--out", default="fabric.ckpt")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()


def shard(model, mesh):
    """Before the first call, so that Fabric finds shards to load a checkpoint into."""
    ids, mesh = torch.zeros(4, 17, dtype=torch.long), mesh["tensor_parallel"]
    tspc.plan(model, (ids,), {"labels": ids, "use_cache": False}, mesh=mesh).apply(model, mesh)
    return model


if args.tsp:
    ranks = int(os.environ["WORLD_SIZE"])
    strategy = ModelParallelStrategy(  # one replica: the same data on all ranks, no DDP
        shard, data_parallel_size=1, tensor_parallel_size=ranks
    )
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
else:
    fabric = Fabric(accelerator="cpu", devices=1)
fabric.launch()
fabric.seed_everything(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
raw = LlamaForCausalLM(config)
model = torch.compile(raw, backend="tsp") if args.tsp else raw
model = fabric.setup(model)
optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=3e-3))
data = torch.randint(0, 64, (16, 17)).unbind()
generator = torch.Generator().manual_seed(0)
loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
state = {"model": model, "optimizer": optimizer, "epoch": 0}
if args.resume:
    fabric.load(args.out, state)

losses = []
for epoch in range(state["epoch"], args.epochs):
    generator.manual_seed(epoch)
    for ids in loader:
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        fabric.backward(loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        losses += [loss.item(), norm.item()]
    state["epoch"] = epoch + 1
    if epoch == 0:
        fabric.save(args.out, state)
fabric.print(json.dumps(losses))
