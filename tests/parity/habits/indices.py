"""Ids and labels that no table has: refused where one device refuses them, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

import tspc
from tests.parity.habits import Side, habit, tokens

WORDS, POSITIONS = 187, 12
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Words(nn.Module):
    """loss(log-probabilities [B, S, words], labels); plain: rows by `weight[ids]`."""

    def __init__(self, loss: Loss, plain: bool = False):
        super().__init__()
        self.loss, self.plain = loss, plain
        self.words, self.places = nn.Embedding(WORDS, 16), nn.Embedding(POSITIONS, 16)
        self.up, self.head = nn.Linear(16, 32), nn.Linear(32, WORDS)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.words.weight[ids] if self.plain else self.words(ids)
        x = x + self.places(torch.arange(ids.shape[1]))
        return self.loss(self.head(torch.tanh(self.up(x))), labels)


def _cross_entropy(y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(y[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _nll(y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(F.log_softmax(y, -1).flatten(0, 1), labels.flatten())


def _along(y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    one = F.one_hot(labels, WORDS).to(y.dtype)
    return torch.take_along_dim(y * one, labels[..., None], -1).mean()


def words() -> nn.Module:
    return Words(_cross_entropy).double()


def plain_words() -> nn.Module:
    return Words(_nll, plain=True).double()


def along_words() -> nn.Module:
    return Words(_along).double()


def _with(value: int) -> torch.Tensor:
    out = tokens(8).clone()
    out[1, 3] = value
    return out


def _each(side: Side) -> list[Any]:
    """The loss of each call, or that it is refused."""
    good, out = tokens(8), []
    for ids, labels in (
        (good, good),
        *((_with(v), good) for v in (999, WORDS, WORDS - 1, -3, -WORDS - 1)),
        *((good, _with(v)) for v in (999, -3, -100)),
        (tokens(POSITIONS + 1), tokens(POSITIONS + 1)),
        (good, good),
    ):
        try:
            out.append(side.call(ids, labels).item())
        except (IndexError, RuntimeError) as e:
            assert not side.compiled or isinstance(e, (tspc.TspcError, IndexError)), e
            out.append("refused")
    assert 4 <= out.count("refused") < 9
    return out


@habit(words)
def ids_and_labels_of_a_loss(side: Side) -> Any:
    return _each(side)


@habit(plain_words)
def negative_indices_of_a_weight(side: Side) -> Any:
    return _each(side)


@habit(along_words)
def one_hot_and_take_along_dim(side: Side) -> Any:
    return _each(side)


@habit(words, raises=(tspc.IndexRangeError, "embedding in words.weight, which takes 0 to 186, is"))
def an_id_out_of_range(side: Side) -> Any:
    return side.call(_with(999), tokens(8))


@habit(words, raises=(IndexError, "which takes 0 to 186, is given 999 on rank"))
def a_label_out_of_range(side: Side) -> Any:
    return side.call(tokens(8), _with(999))


class Coded(nn.Module):
    """Ids and labels that the model computes from floats, scaled by an input."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.codes = nn.Embedding(WORDS, 16), nn.Embedding(32, 16)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)
        self.code, self.head = nn.Linear(16, 32), nn.Linear(16, 32)
        self.double()

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        x = x + self.down(F.gelu(self.up(x)))
        codes = (self.code(x).argmax(-1) * scale).long()
        x = x + self.codes(codes)
        labels = (self.code(x).argmax(-1) * scale).long()
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@habit(Coded)
def ids_and_labels_that_the_model_computes(side: Side) -> Any:
    loss = side.call(tokens(9), torch.ones((), dtype=torch.float64))
    loss.backward()
    return loss.item(), side.grads()


@habit(Coded, raises=(tspc.IndexRangeError, "which takes 0 to 31, is given"))
def a_computed_id_out_of_range(side: Side) -> Any:
    return side.call(tokens(9), torch.full((), 99.0, dtype=torch.float64))
