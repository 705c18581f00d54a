"""One encoder for two texts, a loss between their embeddings: two calls before one backward.

`torchrun --nproc-per-node 2 siamese.py --tsp`, or `python siamese.py`
"""

import argparse
import json
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--tsp", action="store_true")
parser.add_argument("--steps", type=int, default=6)
args = parser.parse_args()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(64, 32), nn.Embedding(16, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.project = nn.Linear(32, 16)

    def forward(self, ids):
        h = self.layers(self.embed(ids) + self.place(torch.arange(ids.shape[1])))
        return F.normalize(self.project(h.mean(1)), dim=-1)


def pairs(step):
    """Texts and the same texts with a few words exchanged."""
    generator = torch.Generator().manual_seed(step)
    one = torch.randint(0, 64, (4, 16), generator=generator)
    other = torch.randint(0, 64, (4, 16), generator=generator)
    return one, torch.where(torch.rand(4, 16, generator=generator) < 0.3, other, one)


torch.manual_seed(0)
encoder = raw = Encoder()
temperature = nn.Parameter(torch.tensor(0.1))
optimizer = torch.optim.AdamW([*raw.parameters(), temperature], lr=1e-3)
if args.tsp:
    encoder = torch.compile(encoder, backend="tsp")

losses = []
for step in range(args.steps):
    one, other = pairs(step)
    similar = encoder(one) @ encoder(other).T / temperature
    labels = torch.arange(len(one))
    loss = (F.cross_entropy(similar, labels) + F.cross_entropy(similar.T, labels)) / 2
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
if os.environ.get("RANK", "0") == "0":
    print(json.dumps(losses))
