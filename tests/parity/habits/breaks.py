"""Graph breaks, and layers that plain code calls: before the first call, between calls, beside a
compiled part."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.parity.habits import Side, habit, tokens

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Chain(nn.Module):
    """An embedding, blocks and a head: model(tokens, labels) -> scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(187, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 187, bias=False)
        self.head.weight = self.embed.weight

    def body(self, h: torch.Tensor) -> torch.Tensor:
        for b in self.blocks:
            h = b(h)
        return self.norm(h)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.body(self.first(self.embed(ids)))
        return F.cross_entropy(self.head(h).flatten(0, 1), labels.flatten())


class Printing(Chain):
    """The loop stands in `forward`, which Dynamo therefore leaves to Python as a whole."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.first(self.embed(ids))
        for b in self.blocks:
            h = b(h)
            print(end="")
        return F.cross_entropy(self.head(h).flatten(0, 1), labels.flatten())


def chain() -> nn.Module:
    return Chain().double()


def printing() -> nn.Module:
    return Printing().double()


def trained(side: Side, loss: Any) -> Any:
    optimizer = torch.optim.SGD(side.model.parameters(), lr=1e-1)
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        losses.append(loss(tokens(9, step)))
        losses[-1].backward()
        optimizer.step()
    return [x.item() for x in losses], side.grads(), side.weights()


@habit(printing)
def a_break_in_a_loop(side: Side) -> Any:
    return trained(side, side.loss)


@habit(chain)
def a_part_that_dynamo_leaves_out(side: Side) -> Any:
    first = side.model.first
    if side.compiled:
        first.forward = torch._dynamo.disable(first.forward)
    return trained(side, side.loss)


@habit(chain)
def blocks_one_by_one(side: Side) -> Any:
    for b in side.model.blocks:
        if side.compiled:
            b.compile(backend="tsp", options={"compiler": "eager"})
    return trained(side, lambda ids: side.model(ids, ids))


@habit(chain)
def embedding_and_head_outside(side: Side) -> Any:
    """The embedding is called before the first call, the head shares its weight."""
    model, body = side.model, side.wrap(side.model.body)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        h = body(model.first(model.embed(ids)))
        return F.cross_entropy(model.head(h).flatten(0, 1), ids.flatten())

    return trained(side, loss)


@habit(chain)
def two_backwards_through_a_graph_made_before(side: Side) -> Any:
    model, ids = side.model, tokens()
    plain = model(ids, ids)
    plain.backward(retain_graph=True)
    side.loss(ids).backward()
    first = {n: g.clone() for n, g in side.grads().items()}
    plain.backward()
    return first, side.grads()
