"""What autocast and `param_dtype` do to each op becomes cast nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from tspc.frontend import autocast
from tspc.frontend.autocast import Entered, OneType, ambient, explicit
from tspc.seams.tensors import enter_autocast

Tensor = torch.Tensor
aten, BF16 = torch.ops.aten, torch.bfloat16
X, W = torch.randn(4, 6), torch.randn(5, 6)


def under(fn: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Tensor) -> Any:
        with torch.autocast("cpu", dtype=BF16, cache_enabled=False):
            return fn(*args)

    return run


def traced(fn: Callable[..., Any], *args: Tensor) -> torch.fx.GraphModule:
    return make_fx(fn, pre_dispatch=True)(*args)


OPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "product": lambda x, w: F.linear(x, w),
    "in fp32 again": lambda x, w: F.linear(x, w).softmax(-1),
    "promotes": lambda x, w: F.linear(x, w) + x[:, :5],
    "loss": lambda x, w: F.cross_entropy(F.linear(x, w), torch.arange(4)),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "made of others": lambda x, w: torch.einsum("ij,kj->ik", x, w),
    "casts of the model": lambda x, w: F.linear(x, w).to(torch.float32) * 2,
    "concatenation": lambda x, w: torch.cat([F.linear(x, w), x], 1),
}


@pytest.mark.parametrize("name", OPS)
def test_a_graph_with_every_cast(name: str) -> None:
    fn = under(OPS[name])
    gm = explicit(traced(fn, X, W), {}, [X, W])
    assert all(n.target is not enter_autocast for n in gm.graph.nodes)
    got, wanted = gm(X, W), fn(X, W)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", OPS)
def test_the_autocast_of_the_caller(name: str) -> None:
    with torch.autocast("cpu", dtype=BF16):
        assert ambient() == {"cpu": BF16}
        plain, wanted = traced(OPS[name], X, W), OPS[name](X, W)
        gm = explicit(plain, ambient(), [X, W])
    assert ambient() == {}
    got = gm(X, W)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)


def test_none_is_the_graph_itself() -> None:
    gm = traced(OPS["product"], X, W)
    assert explicit(gm, {}, [X, W]) is gm


def test_switched_off_inside() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(x, w)

    gm = explicit(traced(under(fn), X, W), {}, [X, W])
    assert gm(X, W).dtype == torch.float32 and torch.equal(gm(X, W), F.linear(X, W))


def test_state_is_left_as_it_was() -> None:
    before = torch.get_autocast_dtype("cpu")
    with autocast._set({"cpu": torch.float16}):
        assert torch.get_autocast_dtype("cpu") == torch.float16
    assert torch.get_autocast_dtype("cpu") == before
    with torch.autocast("cpu", dtype=BF16), autocast.off():
        assert F.linear(X, W).dtype == torch.float32
    gm = traced(OPS["product"], X, W)
    with torch.autocast("cpu", dtype=BF16):
        assert explicit(gm, {}, [X, W]) is gm
    assert gm(X, W).dtype == torch.float32


def test_to_end_autocast_where_there_is_none_costs_no_trace() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(x, w)

    gm = traced(fn, X, W)
    assert any(n.target is enter_autocast for n in gm.graph.nodes)
    after = explicit(gm, {}, [X, W])
    assert after is gm and not any(n.target is enter_autocast for n in gm.graph.nodes)
    assert gm(X, W).dtype == torch.float32


def test_a_graph_is_run_in_what_it_enters() -> None:
    gm = traced(under(OPS["product"]), X, W)
    seen = Entered(gm)
    out = seen.run(X, W)
    assert isinstance(out, Tensor) and out.dtype == BF16 and not seen.stack
    with pytest.raises(RuntimeError):
        Entered(gm).run(X, W[:, :2])
    assert not torch.is_autocast_enabled("cpu")


def test_parameters_in_one_type() -> None:
    mode = OneType(BF16)
    assert mode.cast(X) is not X and mode.cast(3) == 3 and OneType(None).cast(X) is X
    cast, ids = mode.cast(X), torch.arange(2)
    assert isinstance(cast, Tensor) and cast.dtype == BF16 and mode.cast(ids) is ids
    assert mode.cast(cast) is cast


def test_an_op_that_takes_one_type_computes_in_it() -> None:
    from tspc.seams.tensors import dispatch_functionalize

    def run(dtype: torch.dtype | None, fn: Callable[..., Any]) -> Tensor:
        return make_fx(dispatch_functionalize(fn, OneType(dtype)), pre_dispatch=True)(
            X, W.to(BF16)
        )(X, W.to(BF16))

    assert run(BF16, lambda x, w: torch.mm(x, w.t())).dtype == BF16
    assert run(BF16, lambda x, w: x[:, :5] * w[:4, :5]).dtype == torch.float32
    with pytest.raises(RuntimeError):
        run(None, lambda x, w: torch.mm(x, w.t()))
    assert autocast._promotes(aten.add.Tensor) and autocast._promotes(aten.cat.default)
    assert not autocast._promotes(aten.mm.default)


def test_a_kernel_by_its_key() -> None:
    with autocast._set({"cpu": BF16}):
        out = autocast._kernel(aten.linear.default, "AutocastCPU", (X, W), {})
    assert isinstance(out, Tensor) and out.dtype == BF16
