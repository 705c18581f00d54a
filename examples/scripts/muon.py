"""Muon for the matrices of the blocks, AdamW for the rest.

`torchrun --nproc-per-node 2 muon.py --tsp`, or `python muon.py`
"""

import argparse
import json
import os

import torch
import torch.nn.functional as F
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
model = raw = LlamaForCausalLM(config)
matrices = [p for n, p in raw.named_parameters() if "layers" in n and p.dim() == 2]
known = {id(p) for p in matrices}
rest = [p for p in raw.parameters() if id(p) not in known]
optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=3e-3)]
if args.tsp:
    model = torch.compile(model, backend="tsp")

losses = []
for step in range(args.steps):
    ids = torch.randint(0, 64, (4, 18), generator=torch.Generator().manual_seed(step % 2))
    logits = model(ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
if os.environ.get("RANK", "0") == "0":
    print(json.dumps(losses))
