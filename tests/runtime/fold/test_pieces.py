"""Pieces of a body, eager and compiled: what they write and save, what is made again, gradients."""

from __future__ import annotations

import pytest
import sympy
import torch

from tests.support.tiny import Attention, Mlp, proved
from tspc.ir.body import Body, Piece, evaluate
from tspc.ops.run import run_piece
from tspc.runtime.fold.pieces import EagerPieces, InductorPieces, Values, cotangent_names


def bodies_of(model: torch.nn.Module) -> Body:
    (graph,) = proved(model, 2)
    (body,) = graph.rewritten.bodies.values()
    return body


def operands(body: Body, symbols: dict[sympy.Symbol, int], names: tuple[str, ...]) -> Values:
    draw = torch.Generator().manual_seed(0)
    out = {}
    for n in names:
        t = body.values[n]
        shape = [evaluate(s, symbols) for s in t.shape]
        out[n] = torch.randn(shape, generator=draw, dtype=torch.float64).to(t.dtype)
    return out


def sizes_of(body: Body) -> dict[sympy.Symbol, int]:
    return dict(zip(body.sizes, [3] * len(body.symbols) + [4] * len(body.extents)))


def test_a_piece_writes_saves_and_is_made_again() -> None:
    body = bodies_of(Attention())
    symbols, step, eager = sizes_of(body), torch.tensor(0), EagerPieces(body)
    first = body.steps[0]
    assert isinstance(first, Piece) and first.saves
    values = operands(body, symbols, first.reads)
    forward = eager.forward(0, symbols, step, values)
    assert set(forward) == {*first.writes, *first.saves}
    again = eager.again(0, symbols, step, {**values, **forward})
    assert set(again) == set(first.writes)
    assert all(torch.equal(again[n], forward[n]) for n in again)


def test_gradients_of_what_a_piece_reads_are_autograds() -> None:
    body = bodies_of(Mlp())
    symbols, step, eager = sizes_of(body), torch.tensor(0), EagerPieces(body)
    (piece,) = body.pieces
    values = operands(body, symbols, piece.reads)
    leaves = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in values.items()}
    (out,) = (run_piece(piece, symbols, step, dict(leaves), {})[n] for n in piece.writes)
    g = torch.randn_like(out)
    wanted = [n for n in piece.reads if body.values[n].requires_grad]
    grads = torch.autograd.grad(out, [leaves[n] for n in wanted], g)
    values |= eager.forward(0, symbols, step, values)
    got = eager.backward(0, symbols, step, values, {piece.writes[0]: g})
    assert set(got) == set(wanted) and cotangent_names(body, 0) == piece.writes
    for n, d in zip(wanted, grads):
        torch.testing.assert_close(got[n], d)
    assert eager.backward(0, symbols, step, values, {}) == {}


@pytest.mark.slow
def test_compiled_pieces_are_eager_ones() -> None:
    body = bodies_of(Attention())
    hints = {s: 3 for s in body.symbols}
    compiled = InductorPieces(body, hints, [8] * len(body.extents), torch.device("cpu"))
    symbols, step, eager = sizes_of(body), torch.tensor(1), EagerPieces(body)
    for index, piece in enumerate(body.steps):
        if not isinstance(piece, Piece):
            continue
        values = operands(body, symbols, piece.reads)
        a, b = (p.forward(index, symbols, step, values) for p in (eager, compiled))
        torch.testing.assert_close(a, b)
        values |= a
        a, b = (p.again(index, symbols, step, values) for p in (eager, compiled))
        torch.testing.assert_close({n: b[n] for n in a}, a)
        gs = {n: torch.ones_like(values[n]) for n in cotangent_names(body, index)[:1]}
        a, b = (p.backward(index, symbols, step, values, gs) for p in (eager, compiled))
        assert a or not gs
        for n, g in a.items():
            torch.testing.assert_close(b[n], g)
    assert all(isinstance(g, sympy.Basic) for g in compiled.guards)
