"""Weights that are computed from others: torch's parametrizations and one of a user's own."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.nn as nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.parity.habits import Side, habit, tokens
from tests.parity.habits.breaks import Chain, trained
from tspc import UnsupportedError


class Gated(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w * torch.sigmoid(w.mean())


def normed() -> nn.Module:
    model = Chain()
    weight_norm(model.first)
    weight_norm(model.blocks[0].up)
    for b in model.blocks:
        parametrize.register_parametrization(b.down, "weight", Gated())
    return model.double()


def spectral() -> nn.Module:
    model = Chain().double()
    spectral_norm(model.first)
    spectral_norm(model.blocks[0].up)
    return model


@habit(normed)
def weight_norms_and_a_gate(side: Side) -> Any:
    return trained(side, side.loss)


@habit(spectral)
def spectral_norms(side: Side) -> Any:
    """Each call moves the buffers on; two calls before one backward."""
    model = side.model
    held = model.first.parametrizations.weight[0]._u
    (side.loss(tokens(9, 1)) + side.loss(tokens(9, 2))).backward()
    grads = {n: g.clone() for n, g in side.grads().items()}
    assert held is model.first.parametrizations.weight[0]._u
    return grads, trained(side, side.loss), dict(model.named_buffers())


@habit(spectral, raises=(UnsupportedError, "original: has a gradient on one device"))
def a_gradient_that_is_lost(side: Side) -> Any:
    """A trace that takes a weight for one that `no_grad` cut off is found out at its backward."""
    with patch("tspc.frontend.from_fx.gives_itself", lambda n: False):
        side.loss().backward()
