"""The whole step compiled, optimizer included.

`torchrun --nproc-per-node 2 train_step.py --tsp`, or `python train_step.py`
"""

import argparse
import json
import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--tsp", action="store_true")
parser.add_argument("--steps", type=int, default=6)
args = parser.parse_args()

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


def train_step(ids):
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


if args.tsp:
    train_step = torch.compile(train_step, backend="tsp")

losses = []
for step in range(args.steps):
    ids = torch.randint(0, 64, (4, 20), generator=torch.Generator().manual_seed(step % 2))
    losses.append(train_step(ids).item())
if os.environ.get("RANK", "0") == "0":
    print(json.dumps(losses))
