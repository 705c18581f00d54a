"""A GPT trained from scratch, as nanoGPT does: accumulation, clipping, decay, evaluation, a
checkpoint, resuming from it. `torchrun --nproc-per-node 2 nanogpt.py --tsp`, or `python nanogpt.py`
"""

import argparse
import json
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

import tspc

parser = argparse.ArgumentParser()
parser.add_argument("--tsp", action="store_true")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--out", default="nanogpt.pt")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
BLOCK, BATCH, VOCABULARY, HIDDEN, HEADS, ACCUMULATION = 24, 4, 64, 32, 4, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(
            nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN)
        )

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, HEADS, C // HEADS).transpose(1, 2) for t in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(BLOCK, HIDDEN)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(2)), nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.wte.weight = self.head.weight

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def get_batch(split, number):
    """Pieces of the text, drawn by the number of the batch: alike on all ranks of an axis."""
    generator = torch.Generator().manual_seed(number)
    data = text[:1600] if split == "train" else text[1600:]
    starts = torch.randint(len(data) - BLOCK, (BATCH,), generator=generator).tolist()
    return [torch.stack([data[i + k : i + k + BLOCK] for i in starts]) for k in (0, 1)]


rank = int(os.environ.get("RANK", 0))
torch.manual_seed(1337)
text = torch.randint(0, VOCABULARY, (50,)).repeat(40)
model = raw = GPT()
decay = [p for p in raw.parameters() if p.dim() >= 2]
rest = [p for p in raw.parameters() if p.dim() < 2]
groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
if args.tsp:
    model = torch.compile(model, backend="tsp")

first = 0
if args.resume:
    saved = torch.load(args.out)
    raw.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first = saved["step"]
losses = []
for step in range(first, args.steps):
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / 10))
    for micro in range(ACCUMULATION):
        _, loss = model(*get_batch("train", step * ACCUMULATION + micro))
        (loss / ACCUMULATION).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
    if step == 2:
        model.eval()
        with torch.no_grad():
            losses += [model(*get_batch("val", n))[1].item() for n in range(2)]
        model.train()
        weights, moments = tspc.full_state_dict(raw, optimizer)  # on all ranks, whole on the first
        if rank == 0:
            torch.save({"model": weights, "optimizer": moments, "step": step + 1}, args.out)
if rank == 0:
    print(json.dumps(losses))
