"""Checkpoints of torch.distributed.checkpoint, written beside the training, read on another number
of ranks. `torchrun --nproc-per-node 2 checkpoint.py --tsp`, then with 3 and `--resume`
"""

import argparse
import json

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--tsp", action="store_true")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--out", default="checkpoint")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

writers = None
if args.tsp:
    dist.init_process_group("gloo")
    writers = dist.new_group(backend="gloo")  # the thread that writes has a group of its own
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = raw = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(raw.parameters(), lr=3e-3)
if args.tsp:
    model = torch.compile(model, backend="tsp")


def batch(number):
    return torch.randint(0, 64, (4, 18), generator=torch.Generator().manual_seed(number))


class State:
    """What is saved: DCP asks for it, and gives it back, each rank its part."""

    def __init__(self):
        self.step = 0

    def state_dict(self):
        weights, moments = get_state_dict(raw, optimizer)
        return {"model": weights, "optimizer": moments, "step": self.step}

    def load_state_dict(self, state):
        set_state_dict(
            raw, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.step = state["step"]


state, losses, pending = State(), [], None
if args.resume:
    dcp.load({"app": state}, checkpoint_id=args.out)
for step in range(state.step, args.steps):
    loss = model(batch(step), labels=batch(step), use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    state.step = step + 1
    if step == 2:
        pending = dcp.async_save({"app": state}, checkpoint_id=args.out, process_group=writers)
if pending is not None:
    pending.result()
if not args.tsp or dist.get_rank() == 0:
    print(json.dumps(losses))
if args.tsp:
    dist.destroy_process_group()
