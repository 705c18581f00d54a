"""One rank's program through AOTAutograd: eager or by Inductor, communications in order, the key of
its code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.fx.experimental.proxy_tensor import make_fx

from tspc.ir.program import Type
from tspc.ops.counter import mix
from tspc.runtime.lowering import inductor
from tspc.runtime.lowering.inductor import KeepOrder, compile_local, hash_of_code
from tspc.runtime.lowering.trace import Fakes, local_fakes

ops = torch.ops.tspc
CPU = torch.device("cpu")


class Program(nn.Module):
    """No sizes, no rows; two placeholders."""

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> list[Any]:
        return [torch.tanh(x @ w).sum(), mix(torch.arange(4))]


def fakes() -> Fakes:
    types = [Type((5, 3), torch.float64, True), Type((3, 2), torch.float64, True)]
    return local_fakes([], {}, [], [(t, CPU) for t in types])


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_program_is_the_program(compiler: str) -> None:
    x, w = torch.randn(5, 3).double(), torch.randn(3, 2).double()
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    run = compile_local(Program(), fakes(), compiler)
    loss, mixed = run(*leaves)
    others = [t.clone().requires_grad_() for t in (x, w)]
    wanted, bits = Program()(*others)
    torch.testing.assert_close(loss, wanted)
    assert torch.equal(mixed, bits)
    loss.backward()
    wanted.backward()
    for a, b in zip(leaves, others):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.autocast("cpu"):
        assert run(*leaves)[0].dtype == torch.float64


def test_autocast_of_a_caller_casts_nothing_again() -> None:
    run = inductor._without_autocast(lambda args: args[0] @ args[0])
    with torch.autocast("cpu"):
        assert run([torch.ones(2, 2)]).dtype == torch.float32


def chain(kept: bool) -> list[str]:
    """The order in which tspc's ops depend on each other."""

    def fn(x: torch.Tensor) -> list[torch.Tensor]:
        return [ops.all_reduce(x, "a"), ops.vary([x], None, "a")[0], ops.all_reduce(x + 1, "a")]

    gm = make_fx(fn, tracing_mode="fake")(torch.ones(2))
    if kept:
        KeepOrder()(gm.graph)
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def test_communications_are_chained_in_their_order() -> None:
    assert sum("control_deps" in t for t in chain(True)) >= 2
    assert not any("control_deps" in t for t in chain(False))
    assert KeepOrder().uuid() == "tspc-keep-order-1"


def test_what_a_cache_does_not_see_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        return vars(inductor._traced(Program(), fakes()))["tspc_key"]

    first = key()
    assert key() == first and len(first) == 64
    monkeypatch.setattr(inductor, "_own_code", lambda: "other code")
    assert key() != first


def test_the_hash_of_all_code_of_a_package(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "a.py").write_text("1")
    (inner / "b.py").write_text("2")
    first = hash_of_code(tmp_path)
    (tmp_path / "note.txt").write_text("no code")
    assert hash_of_code(tmp_path) == first
    (inner / "b.py").write_text("3")
    changed = hash_of_code(tmp_path)
    (inner / "b.py").rename(inner / "c.py")
    assert len({first, changed, hash_of_code(tmp_path)}) == 3 and len(inductor._own_code()) == 64


def test_a_lowered_graph_goes_through_torchs_cache() -> None:
    class Graph:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def __call__(self, inputs: Any) -> Any:
            return [inputs[0] @ inputs[0]]

        def prepare_for_serialization(self) -> None:
            self.calls.append("prepared")

        def set_triton_bundle(self, bundle: Any) -> None:
            self.calls.append(bundle)

    graph = Graph()
    lowered = inductor.Lowered(graph)
    with torch.autocast("cpu"):
        assert lowered([torch.ones(2, 2)])[0].dtype == torch.float32
    lowered.prepare_for_serialization()
    lowered.set_triton_bundle("a bundle")
    assert graph.calls == ["prepared", "a bundle"] and lowered.graph is not graph
