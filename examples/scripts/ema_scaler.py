"""An average of the weights for evaluation, a scaled loss, mixed precision with --amp.

`torchrun --nproc-per-node 2 ema_scaler.py --tsp`, or `python ema_scaler.py`
"""

import argparse
import json
import os

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--tsp", action="store_true")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--amp", action="store_true")
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
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=args.steps)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
train, evaluate = model, ema
if args.tsp:
    train = torch.compile(model, backend="tsp")
    evaluate = torch.compile(ema, backend="tsp")


def batch(number):
    return torch.randint(0, 64, (4, 20), generator=torch.Generator().manual_seed(number))


losses = []
for step in range(args.steps):
    ids = batch(step % 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
        loss = train(ids, labels=ids, use_cache=False).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    optimizer.zero_grad()
    ema.update_parameters(model)
    losses += [loss.item(), norm.item()]
ema.eval()
with torch.no_grad():
    losses.append(evaluate(batch(9), labels=batch(9), use_cache=False).loss.item())
losses.append(scaler.get_scale())
if os.environ.get("RANK", "0") == "0":
    print(json.dumps(losses))
