"""One rank's program on local fakes: symbols of its own, forward and backward cut apart."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from tspc.ir.program import Type
from tspc.runtime.lowering import trace
from tspc.runtime.lowering.trace import local_fakes, partition, tag

S = sympy.Symbol("s", positive=True, integer=True)
CPU = torch.device("cpu")
TYPES = [
    (Type((S, 3), torch.float64, True), CPU),
    (Type((3, 2), torch.float64, True), CPU),
    (Type((S,), torch.int64), CPU),
]


def fakes() -> trace.Fakes:
    return local_fakes([S], {S: 8}, [4], TYPES)


def test_fakes_have_symbols_of_their_own() -> None:
    f = fakes()
    assert len(f.inputs) == 5 and list(f.symbols) == [S] and not f.mode.cache_enabled
    size, rows = f.symbols[S], f.rows[0]
    assert isinstance(size, torch.SymInt) and isinstance(rows, torch.SymInt)
    assert size.node.expr != rows.node.expr and (size.node.hint, rows.node.hint) == (8, 4)
    assert f.tensors[0].shape[0].node.expr == size.node.expr and f.tensors[0].requires_grad
    assert not f.tensors[2].requires_grad and f.tensors[2].dtype == torch.int64


def program(s: Any, c: Any, x: torch.Tensor, w: torch.Tensor, i: torch.Tensor) -> tuple[Any, ...]:
    y = torch.tanh(x @ w)
    return y.sum(), i + 1, x.view(-1)


def test_forward_and_backward_are_cut_apart() -> None:
    parts = partition(program, fakes())
    assert parts.outputs == 3 and parts.tangents == (0, 2) and parts.backward is not None
    x, w, i = torch.randn(5, 3).double(), torch.randn(3, 2).double(), torch.arange(5)
    loss, more, flat, *saved = parts.forward(5, 4, x, w, i)
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    wanted = torch.tanh(leaves[0] @ leaves[1]).sum()
    torch.testing.assert_close(loss, wanted.detach())
    assert torch.equal(more, i + 1) and torch.equal(flat, x.view(-1))
    ints = [s for s in saved if isinstance(s, int)]
    saved = [*ints, *(s for s in saved if not isinstance(s, int))]
    grads = parts.backward(*saved, torch.ones(()).double(), torch.zeros(15).double())
    given = [g for g in grads if g is not None]
    for a, b in zip(given, torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_without_gradients_there_is_no_backward() -> None:
    parts = partition(lambda s, c, x, w, i: (i * 2,), fakes())
    assert parts.backward is None and parts.tangents == () and parts.outputs == 1
    assert torch.equal(parts.forward(2, 1, None, None, torch.arange(2))[0], torch.arange(2) * 2)
    with torch.no_grad():
        assert partition(program, fakes()).backward is None


def test_what_is_recomputed_and_what_is_saved() -> None:
    ops = torch.ops.tspc

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = ops.gather_weight(x, 0, 4, False, x.dtype, None, "t")
        return ops.all_reduce(ops.clear_pads(y, 0, 1, 1, 4, 4, "contiguous", "t"), "t").sin()

    gm = make_fx(fn, tracing_mode="fake")(torch.ones(2))
    tag(gm)
    policies = {
        n.target._opname: n.meta.get("recompute") for n in gm.graph.nodes if n.op == "call_function"
    }
    assert policies == {
        "gather_weight": CheckpointPolicy.MUST_RECOMPUTE,
        "clear_pads": CheckpointPolicy.MUST_RECOMPUTE,
        "all_reduce": CheckpointPolicy.MUST_SAVE,
        "sin": None,
    }


@pytest.mark.parametrize("marked", [True, False])
def test_checkpointed_parts_are_tagged(marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from tspc.ops.recompute import recomputed

    calls: list[int] = []
    monkeypatch.setattr(trace, "tag", lambda joint: calls.append(1))

    def fn(s: Any, c: Any, x: torch.Tensor, w: torch.Tensor, i: torch.Tensor) -> tuple[Any, ...]:
        with recomputed(1 if marked else 0, False):
            y = torch.tanh(x @ w)
        return (y.sum(),)

    with torch.fx.traceback.preserve_node_meta():
        partition(fn, fakes())
    assert len(calls) == marked
