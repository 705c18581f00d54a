"""Greedy decoding with a cache of keys and values, by hand and by the library's `generate`.

`torchrun --nproc-per-node 2 generate.py --tsp`, or `python generate.py`
"""

import argparse
import json
import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--tsp", action="store_true")
parser.add_argument("--steps", type=int, default=5)
args = parser.parse_args()

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
model = LlamaForCausalLM(config).eval()
if args.tsp:
    model.compile(backend="tsp")  # in place: `generate` calls the model itself
prompt = torch.randint(0, 64, (2, 12))

with torch.inference_mode():
    tokens, ids, cache, scores = prompt, prompt, None, []
    for _ in range(args.steps):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache, last = out.past_key_values, out.logits[:, -1]
        ids = last.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, ids], 1)
        scores.append(last.logsumexp(-1).mean().item())
    made = model.generate(prompt, max_new_tokens=args.steps, do_sample=False, pad_token_id=0)

assert made.tolist() == tokens.tolist()
if os.environ.get("RANK", "0") == "0":
    print(json.dumps(scores + tokens.flatten().tolist()))
