"""A loop with accelerate: accumulation, clipping, a schedule, evaluation, `save_state` and
`load_state`. `torchrun --nproc-per-node 2 accelerate_loop.py --tsp`, or `python accelerate_loop.py`
"""

import argparse
import json

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import tspc.trainer

parser = argparse.ArgumentParser()
parser.add_argument("--tsp", action="store_true")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--out", default="accelerated")
parser.add_argument("--precision", default="no")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

if args.tsp:
    tspc.trainer.register()
accelerator = Accelerator(
    cpu=True,
    gradient_accumulation_steps=2,
    mixed_precision=args.precision,
    dynamo_backend="tsp" if args.tsp else "no",
)
set_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
data = torch.randint(0, 64, (40, 17)).unbind()
train = DataLoader(data[:32], batch_size=4, shuffle=True, drop_last=True)
test = DataLoader(data[32:], batch_size=4)
model, optimizer, scheduler, train, test = accelerator.prepare(
    model, optimizer, scheduler, train, test
)
first = 0
if args.resume:
    accelerator.load_state(args.out)
    first = 1

losses = []
for epoch in range(first, args.epochs):
    train.set_epoch(epoch)
    for ids in train:
        with accelerator.accumulate(model):
            loss = model(ids, labels=ids, use_cache=False).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        every = [model(ids, labels=ids, use_cache=False).loss for ids in test]
    losses.append(accelerator.gather_for_metrics(torch.stack(every)).mean().item())
    model.train()
    if epoch == 0 and not args.resume:
        accelerator.save_state(args.out)
losses.append(scheduler.get_last_lr()[0])
if accelerator.is_main_process:
    print(json.dumps(losses))
accelerator.end_training()
