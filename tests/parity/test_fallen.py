"""Kinds of models that ended a compile or a call once: each equals one device, on 2 and 3 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tspc
from tests.parity.habits.writes import Bounded

pytestmark = pytest.mark.sampled(2)

WIDTH = 8


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(17, WIDTH), nn.Linear(WIDTH, 17)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).split(WIDTH, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.stream(x + self.attend(x), ids)
        return self.loss(x + self.mlp(x), labels)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    def stream(self, x: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError


class Adapted(Base):
    """The norm of W + B A over input features, in the graph: a product without tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(s) / 3) for s in ((2, WIDTH), (2 * WIDTH, 2)))
        self.m = nn.Parameter(torch.rand(2 * WIDTH) + 0.5)

    def mlp(self, x: Tensor) -> Tensor:
        w = self.up.weight + self.b @ self.a
        return self.down(F.gelu(F.linear(x, w * (self.m / w.norm(dim=1))[:, None], self.up.bias)))

    def stream(self, x: Tensor, ids: Tensor) -> Tensor:
        return x


class Modulated(Base):
    """Two tables of scale, shift, gate for all blocks, used by two norms in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterList(torch.randn(3 * WIDTH) / 3 for _ in range(2))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        for mix in (self.mlp, self.attend):
            parts = [t.split(WIDTH) for t in self.tables]
            y = x
            for shift, scale, _ in parts:
                y = F.layer_norm(y, (WIDTH,)) * (1 + scale) + shift
            x = x + parts[0][2] * mix(y) * parts[1][2]
        return self.loss(x, labels)


class Overlapping(Base):
    """Windows of five rows around each."""

    def stream(self, x: Tensor, ids: Tensor) -> Tensor:
        near = F.pad(x, (0, 0, 2, 2)).unfold(1, 5, 1)
        weight = (x.unsqueeze(-1) * near).sum(2, keepdim=True).softmax(-1)
        return x + (near * weight).sum(-1)


class Pairs(Base):
    """A product of two sequence dims."""

    def stream(self, x: Tensor, ids: Tensor) -> Tensor:
        pair = self.mlp(F.layer_norm(x[:, :, None] * x[:, None], (WIDTH,)))
        pair = pair + torch.einsum("bikh,bjkh->bijh", torch.sigmoid(pair), pair)
        return x + pair.mean(2)


class Shifted(Base):
    """Five shifts of one row, by pads and by slices; the first row is kept."""

    def stream(self, x: Tensor, ids: Tensor) -> Tensor:
        first = x[:, :1]
        for k in range(5):
            if k % 2:
                x = x + 0.3 * F.pad(x[:, :-1], (0, 0, 1, 0))
            else:
                x = torch.cat([x[:, :1], x[:, 1:] + 0.3 * x[:, :-1]], 1)
        return torch.cat([first, x[:, 1:]], 1)


class Masked(Base):
    """Writes by a mask into views, in a checkpointed part."""

    def block(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.attend(x)
        h[~mask] = 0
        y = self.mlp(x + h)
        y[..., : WIDTH // 2][~mask] = 0
        y.transpose(0, 1)[mask.T] *= 2
        y = y.view(-1, WIDTH)
        y[~mask.view(-1)] = 0
        return x + y.view_as(x)

    def stream(self, x: Tensor, ids: Tensor) -> Tensor:
        return checkpoint(self.block, x, ids > 3, use_reentrant=False)  # type: ignore[return-value]


class Chunked(Base):
    """The loss in checkpointed uneven chunks of the sequence."""

    def stream(self, x: Tensor, ids: Tensor) -> Tensor:
        return x

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        total: Any = 0.0
        for some, of in zip(x.split(3, 1), labels.split(3, 1)):
            total = total + checkpoint(self.part, some, of, use_reentrant=False)
        return total / labels.numel()

    def part(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), reduction="sum")


KINDS = [Adapted, Bounded, Chunked, Masked, Modulated, Overlapping, Pairs, Shifted]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_device(kind: type[nn.Module], ranks: int) -> None:
    torch.manual_seed(0)
    ids, labels = torch.randint(0, 17, (2, 2, 7))
    found = tspc.verify(kind().double(), (ids, labels), {}, ranks, {}, 1e-9)
    assert found.errors["gradient of"]


class InQuarters(Chunked):
    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        total: Any = 0.0
        for some, of in zip(x.chunk(4, 1), labels.chunk(4, 1)):
            total = total + checkpoint(self.part, some, of, use_reentrant=False)
        return total / labels.numel()


def test_chunks_of_a_length_that_is_a_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the analysis of the last, shorter chunk cannot treat runs replicated."""
    monkeypatch.delenv("TSPC_STRICT_INTERNAL")
    torch.manual_seed(0)
    ids, labels = torch.randint(0, 17, (2, 2, 7))
    with torch._dynamo.config.patch(assume_static_by_default=False):
        found = tspc.verify(InQuarters().double(), (ids, labels), {}, 2, {}, 1e-9)
    assert found.errors["gradient of"]
