"""Run the pieces of a body eagerly: the backward recomputes the piece and differentiates it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tspc.body import Body, Piece

Values = dict[str, torch.Tensor]


class EagerPieces:
    """Pieces as plain functions under autograd."""

    def __init__(self, body: Body):
        self.body = body

    def forward(
        self, index: int, symbols: Mapping[Any, Any], step: torch.Tensor, values: Values
    ) -> Values:
        """What the piece writes."""
        piece = self._piece(index)
        with torch.no_grad():
            made = piece.run(symbols, step, {n: values[n] for n in piece.reads})
        return {n: made[n] for n in piece.writes}

    def backward(
        self,
        index: int,
        symbols: Mapping[Any, Any],
        step: torch.Tensor,
        values: Values,
        cotangents: Values,
    ) -> Values:
        """Gradients of what the piece reads."""
        piece = self._piece(index)
        wanted = [n for n in piece.reads if self.body.values[n].requires_grad]
        leaves = {n: values[n].detach().requires_grad_() for n in wanted}
        with torch.enable_grad():
            made = piece.run(symbols, step, {n: leaves.get(n, values[n]) for n in piece.reads})
        outs = [n for n in cotangents if made[n].requires_grad]
        if not outs or not wanted:
            return {}
        grads = torch.autograd.grad(
            [made[n] for n in outs],
            [leaves[n] for n in wanted],
            [cotangents[n].to(made[n].dtype) for n in outs],
            allow_unused=True,
        )
        return {n: g for n, g in zip(wanted, grads) if g is not None}

    def _piece(self, index: int) -> Piece:
        piece = self.body.steps[index]
        assert isinstance(piece, Piece)
        return piece
