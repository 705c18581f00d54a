"""Ops that capture takes apart: what they become has rules, changes nothing in place, and gives the
same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import tspc
from tests.support.samples import Sample, ids, of, x
from tspc.backend.brute import check, traced
from tspc.frontend.decompose import nll_loss, taken_apart
from tspc.ir.program import OUTPUT

aten = torch.ops.aten


def samples() -> dict[Any, Sample]:
    a, b, share, sign = x(4, 5, 7), x(4, 5, 7), x(4, 5, 7).sigmoid(), x(4, 5, 7).sign()
    m, n, v = x(5, 7), x(7, 3), x(7)
    pair = lambda op: lambda p, q: op([p, q])  # noqa: E731
    out: list[tuple[Any, Sample]] = [
        (f, of(f, a, b))
        for f in (
            aten.mse_loss.default,
            aten.l1_loss.default,
            aten.huber_loss.default,
            aten.expand_as.default,
            aten.view_as.default,
            aten.reshape_as.default,
            aten.inner.default,
            aten.cosine_similarity.default,
            aten.pairwise_distance.default,
        )
    ]
    out += [
        (aten.smooth_l1_loss.default, of(aten.smooth_l1_loss.default, a, b, 1, 0.5)),
        (aten.kl_div.default, of(aten.kl_div.default, a, b, 1, log_target=True)),
        (aten.soft_margin_loss.default, of(aten.soft_margin_loss.default, a, sign)),
        (
            aten.poisson_nll_loss.default,
            of(aten.poisson_nll_loss.default, a, share, True, False, 1e-8, 1),
        ),
        (
            aten.binary_cross_entropy.default,
            of(aten.binary_cross_entropy.default, share, b.sigmoid()),
        ),
        (
            aten.binary_cross_entropy_with_logits.default,
            of(aten.binary_cross_entropy_with_logits.default, a, share),
        ),
        (aten.nll_loss_nd.default, of(aten.nll_loss_nd.default, m, ids(7, 5), x(7).exp(), 1, 3)),
        (aten.movedim.int, of(aten.movedim.int, a, 0, 2)),
        (aten.movedim.intlist, of(aten.movedim.intlist, a, [0, 1], [1, 2])),
        (aten.moveaxis.int, of(aten.moveaxis.int, a, 0, 2)),
        (aten.moveaxis.intlist, of(aten.moveaxis.intlist, a, [0, 1], [1, 2])),
        (aten.swapaxes.default, of(aten.swapaxes.default, a, 0, 2)),
        (aten.swapdims.default, of(aten.swapdims.default, a, 0, 2)),
        (aten.mT.default, of(aten.mT.default, a)),
        (aten.mH.default, of(aten.mH.default, a)),
        (aten.adjoint.default, of(aten.adjoint.default, a)),
        (aten.narrow.default, of(aten.narrow.default, a, 1, 1, 3)),
        (aten.tile.default, of(aten.tile.default, a, [2, 1])),
        (aten.ravel.default, of(aten.ravel.default, a)),
        (
            aten.tensor_split.indices,
            of(aten.tensor_split.indices, a, [2, 3], 1),
        ),
        (aten.unsafe_split.Tensor, of(aten.unsafe_split.Tensor, a, 2, 0)),
        (aten.unsafe_chunk.default, of(aten.unsafe_chunk.default, a, 2, 0)),
        (aten.fliplr.default, of(aten.fliplr.default, a)),
        (aten.flipud.default, of(aten.flipud.default, a)),
        (aten.take_along_dim.default, of(aten.take_along_dim.default, a, ids(5, 4, 2, 7), 1)),
        (aten.dot.default, of(aten.dot.default, v, x(7))),
        (aten.mv.default, of(aten.mv.default, m, v)),
        (aten.addmv.default, of(aten.addmv.default, x(5), m, v)),
        (aten.addr.default, of(aten.addr.default, m, x(5), v)),
        (aten.tensordot.default, of(aten.tensordot.default, a, n, [2], [0])),
        (aten.linalg_matmul.default, of(aten.linalg_matmul.default, m, n)),
        (aten.linalg_norm.default, of(aten.linalg_norm.default, a, 2, [1])),
        (aten.frobenius_norm.dim, of(aten.frobenius_norm.dim, a, [1])),
        (aten.std_mean.correction, of(aten.std_mean.correction, a, [1], correction=1)),
        (aten.var_mean.correction, of(aten.var_mean.correction, a, [1], correction=1)),
        (aten.glu.default, of(aten.glu.default, a, 0)),
        (aten.argsort.default, of(aten.argsort.default, a, 1)),
    ]
    out += [
        (op, (pair(op), (a, b)))
        for op in (
            aten.hstack.default,
            aten.vstack.default,
            aten.dstack.default,
            aten.column_stack.default,
            aten.concat.default,
            aten.broadcast_tensors.default,
            aten.atleast_1d.Sequence,
            aten.atleast_2d.Sequence,
            aten.atleast_3d.Sequence,
        )
    ]
    out.append((aten.chain_matmul.default, (pair(aten.chain_matmul.default), (m, n))))
    return dict(out)


SAMPLES = samples()
NOTHING_TO_DO = (
    aten.broadcast_tensors.default,
    aten.atleast_1d.Sequence,
    aten.atleast_2d.Sequence,
    aten.atleast_3d.Sequence,
)


def test_every_one_has_a_sample() -> None:
    assert set(SAMPLES) == set(taken_apart())


@pytest.mark.parametrize("op", SAMPLES, ids=str)
def test_its_parts_have_rules(op: Any) -> None:
    fn, tensors = SAMPLES[op]
    a, env = traced(fn, *tensors, apart=taken_apart())
    calls = [n for n in a.program.nodes if n.is_call]
    assert op not in {n.op for n in calls} and not a.fallbacks
    assert not any(n.op._schema.is_mutable for n in calls)
    expected = fn(*tensors)
    results = expected if isinstance(expected, (list, tuple)) else [expected]
    (output,) = (n for n in a.program.nodes if n.op == OUTPUT)
    for ref, y in zip(output.refs(), results):
        torch.testing.assert_close(env[ref.value], y)
    assert (calls and check(a, env)) or op in NOTHING_TO_DO


class Losses(nn.Module):
    """Of a sharded sequence, each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up = nn.Embedding(23, 12), nn.Linear(12, 24)
        self.down, self.head = nn.Linear(12, 12), nn.Linear(12, 23)

    def forward(self, tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens)
        y = self.down(F.glu(self.up(x))).movedim(1, 0).swapaxes(0, 1)
        share = F.log_softmax(self.head(y), -1)
        loss = F.mse_loss(y, target) + F.huber_loss(y, target, reduction="sum")
        loss = loss + F.smooth_l1_loss(y, x) + F.l1_loss(y, x, reduction="none").mean((1, 2)).sum()
        loss = loss + F.kl_div(share, share.detach().roll(1, -1), reduction="sum", log_target=True)
        loss = loss + F.nll_loss(share.flatten(0, 1), tokens.flatten(), ignore_index=3)
        loss = loss + F.binary_cross_entropy_with_logits(y, target.sigmoid())
        return loss + F.cosine_similarity(y, target, dim=-1).sum()


def test_losses_of_a_cut_sequence() -> None:
    torch.manual_seed(0)
    tokens, target = ids(23, 2, 13), x(2, 13, 12)
    found = tspc.verify(Losses().double(), (tokens, target), {}, 3, {}, 1e-9)
    (graph,) = found.graphs
    assert not graph.rewritten.typed.fallbacks and not graph.rewritten.analysis.fallbacks


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("shape,classes", [((5, 7), 7), ((4, 7, 5), 7), ((7,), 7)])
def test_nll_loss(shape: tuple[int, ...], classes: int, reduction: int) -> None:
    scores = x(*shape).requires_grad_()
    target = ids(classes, *(s for k, s in enumerate(shape) if k != min(1, len(shape) - 1)))
    for weight in (None, x(classes).exp()):
        args = (scores, target, weight, reduction, 3)
        torch.testing.assert_close(nll_loss(*args), aten.nll_loss_nd.default(*args), equal_nan=True)
