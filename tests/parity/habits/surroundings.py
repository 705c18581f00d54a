"""What runs around a training loop: threads, worker processes, settings of the process."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import threading
from typing import Any
from unittest import mock

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset

from tests.parity.habits import Side, habit, tokens


def train(side: Side, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        loss = side.loss(tokens(9, step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@habit()
def trained_in_a_second_thread(side: Side) -> Any:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        losses = pool.submit(train, side).result()
    return losses, side.weights()


@habit(again=True)
def evaluated_in_another_thread_than_trained(side: Side) -> Any:
    losses, seen = train(side), []

    def evaluate() -> None:
        with torch.no_grad():
            seen.append(side.loss(tokens(11, 5)).item())
        seen.append(side.model.head.weight.norm().item())

    thread = threading.Thread(target=evaluate)
    thread.start()
    thread.join()
    return losses, seen, train(side, 2), side.weights()


class Numbered(Dataset):
    """Sequences of ids, made where a worker asks for them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        return tokens(9, i)[0]


@habit(again=True)
def batches_of_forked_workers(side: Side) -> Any:
    """The workers are forked after the model has been called, and live while it trains."""
    optimizer = torch.optim.SGD(side.model.parameters(), lr=1e-2)
    losses = [side.loss().item()]
    loader = DataLoader(Numbered(), batch_size=2, num_workers=2, multiprocessing_context="fork")
    # a rank of a test is a daemon, which may have no children
    with mock.patch.dict(multiprocessing.current_process()._config, daemon=False):  # type: ignore[attr-defined]
        for _ in range(2):
            for batch in loader:
                loss = side.loss(batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    return losses, side.weights()


class Typed(nn.Module):
    """Makes tensors of the default type while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up = nn.Embedding(187, 8), nn.Linear(8, 24)
        self.down, self.head = nn.Linear(24, 8), nn.Linear(8, 187)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + torch.linspace(0, 1, ids.shape[1])[:, None]
        x = x + self.down(torch.tanh(self.up(x))) * torch.tensor(0.5)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def typed() -> nn.Module:
    torch.set_default_dtype(torch.float64)
    try:
        return Typed()
    finally:
        torch.set_default_dtype(torch.float32)


@habit(build=typed)
def default_type_is_double(side: Side) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        return train(side), side.weights(), str(side.loss().dtype)
    finally:
        torch.set_default_dtype(torch.float32)
