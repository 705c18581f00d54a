"""Private APIs of torch, one function each: what each does to torch, undone afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch._dynamo import eval_frame
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer, _muon

from tests.support.group import alone, cut
from tspc.seams import compiler


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceMesh]:
    with alone() as m:
        yield m


class Refused(Exception):
    pass


def test_errors_of_a_backend_reach_the_caller_as_they_are() -> None:
    @compiler.plainly(Refused)
    def backend(gm: torch.fx.GraphModule, inputs: object) -> Any:
        raise Refused("in words")

    with pytest.raises(Refused, match="^in words$"):
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))


def test_a_backend_may_have_the_frame_traced_again() -> None:
    calls: list[int] = []

    def backend(gm: torch.fx.GraphModule, inputs: object) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise compiler.RestartTrace(restart_reason="once more")
        return gm.forward

    fn = torch.compile(lambda x: x + 1, backend=backend)
    assert fn(torch.ones(1)).item() == 2 and len(calls) == 2


def test_outside_of_dynamo_nothing_is_compiled() -> None:
    code: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: object) -> Any:
        code.append(gm.code)
        return gm.forward

    inner = compiler.outside_of_dynamo(lambda x: x.sin())
    fn = torch.compile(lambda x: inner(x + 1) * 2, backend=backend)
    assert fn(torch.zeros(1)).item() == 2 * torch.ones(1).sin().item()
    assert len(code) == 2 and not any("sin" in c for c in code)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_a_graph_tells_its_tensors_sources_and_modules() -> None:
    model, found = Inner(), dict[str, Any]()

    def backend(gm: torch.fx.GraphModule, inputs: object) -> Any:
        found["tensors"] = compiler.real_tensors(gm)
        holders = gm.graph.find_nodes(op="placeholder")
        found["sources"] = [compiler.source_name(n) for n in holders]
        found["roots"] = compiler.compiled_roots(gm)
        return gm.forward

    torch.compile(model, backend=backend)(torch.ones(1, 2))
    assert [x for _, x in found["tensors"]][:1] == [model.linear.weight]
    assert any("weight" in s for s in found["sources"]) and "L['x']" in found["sources"]
    assert found["roots"] == [model]
    outer = torch.compile(lambda x: model(x), backend=backend)
    outer(torch.ones(1, 2))
    assert found["roots"] == [model]
    assert compiler.source_name(torch.fx.Graph().placeholder("x")) == ""


def test_an_op_in_parts() -> None:
    x, y = torch.randn(3), torch.randn(3)
    for op in (torch.ops.aten.mse_loss.default, torch.ops.aten.dot.default):
        torch.testing.assert_close(compiler.parts_of(op)(x, y), op(x, y))


def test_members_are_replaced() -> None:
    class Owner:
        name = 1

    compiler.replace_member(Owner, "name", 2)
    assert Owner.name == 2


def test_what_is_compiled_with_a_backend_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        eval_frame._TorchDynamoContext, "__call__", eval_frame._TorchDynamoContext.__call__
    )
    wrapped: list[tuple[object, bool]] = []

    def backend(gm: torch.fx.GraphModule, inputs: object, options: object = None) -> Any:
        return gm.forward

    def wrap(compiled: Any, root: object, strict: bool) -> object:
        wrapped.append((root, strict))
        return compiled

    def other(gm: torch.fx.GraphModule, inputs: object) -> Any:
        return gm.forward

    compiler.on_compile(backend, wrap)
    model = Inner()
    x = torch.ones(1, 2)
    assert torch.equal(torch.compile(model, backend=backend)(x), model(x))

    def fn(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    torch.compile(fn, backend=backend, options={"strict": True})(x)
    torch.compile(fn, backend=other)(x)
    assert wrapped == [(model, False), (fn, True)]


def test_whether_something_traces() -> None:
    inside: list[bool] = []

    def backend(gm: torch.fx.GraphModule, inputs: object) -> Any:
        inside.append(compiler.tracing())
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    assert inside == [True] and not compiler.tracing()


def test_why_a_forward_was_left_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Inner()
    assert compiler.why_not_forward(model) == 'TORCH_LOGS="dynamo" tells why'
    disabled = torch._dynamo.disable(lambda x: x)
    assert compiler.why_not_forward(disabled) == "it is under torch._dynamo.disable"
    assert "a module that Dynamo skips" in compiler.why_not_forward(copy.deepcopy)
    with torch.compiler.set_stance("force_eager"):
        assert "set_stance('force_eager') is on" in compiler.why_not_forward(model)
    with torch._dynamo.config.patch(suppress_errors=True):
        assert "suppress_errors is on" in compiler.why_not_forward(model)


def test_why_a_weight_is_read_by_python() -> None:
    text = compiler.why_outside(False)
    assert "test_compiler.py:" in text and "Dynamo left it to Python" in text
    assert compiler.why_outside(True).endswith("the module is called without torch.compile")
    disabled = torch._dynamo.disable(lambda: compiler.why_outside(False))
    assert "it is under torch._dynamo.disable" in disabled()


def test_donated_buffers_are_none_while_compiling() -> None:
    from torch._functorch._aot_autograd import graph_compile

    before = graph_compile.collect_bw_donated_buffer_idxs
    with compiler.keep_saved():
        assert graph_compile.collect_bw_donated_buffer_idxs(None) == []  # type: ignore[call-arg]
    assert graph_compile.collect_bw_donated_buffer_idxs is before


def test_the_store_and_the_timeout_of_a_group(mesh: DeviceMesh) -> None:
    compiler.default_store().set("k", "v")
    assert compiler.default_store().get("k") == b"v"
    group = dist.new_group([0], timeout=timedelta(seconds=77))
    assert compiler.timeout_of(group) == timedelta(seconds=77)
    assert compiler.timeout_of(None) is None


def test_kept_specs_are_forgotten(mesh: DeviceMesh) -> None:
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    d = cut(torch.ones(2, 2), mesh)
    torch.ops.aten.mm.default(d, d)
    compiler.forget_specs()
    assert propagator.propagate_op_sharding.cache_info().currsize == 0


def test_one_number_for_a_storage() -> None:
    x = torch.ones(4)
    assert compiler.storage_key(x) == compiler.storage_key(x[2:]) != 0
    assert compiler.storage_key(torch.ones(4)) != compiler.storage_key(x)
    before = compiler.uses(x)
    held = x.view(2, 2)
    assert compiler.uses(x) >= before and held.shape == (2, 2)


def test_data_of_a_shard_is_set_whole_or_alike(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DTensor, "data", torch.Tensor.data)
    monkeypatch.delattr(DTensor, "data")
    other = cut(torch.ones(2, 2), mesh)
    compiler.assign_data_of_shards(lambda x: x is not other, Refused)
    d = cut(torch.zeros(2, 2), mesh)
    d.data = torch.full((2, 2), 3.0)
    assert d.to_local().tolist() == [[3, 3], [3, 3]]
    d.data = cut(torch.full((2, 2), 4.0), mesh)
    assert d.to_local()[0, 0] == 4
    with pytest.raises(Refused, match=r"\[2, 2\] torch.float32 was set to \[3\]"):
        d.data = torch.ones(3)
    compiler.assign_data_of_shards(lambda x: False, Refused)  # once
    d.data = torch.full((2, 2), 5.0)
    assert d.to_local()[0, 0] == 5 and torch.equal(d.data.to_local(), d.to_local())
    delattr(DTensor, "data")


def test_anomaly_mode_asks_whole_gradients(mesh: DeviceMesh) -> None:
    compiler.find_nan_in_shards()
    compiler.find_nan_in_shards()
    d = cut(torch.tensor([False, True]), mesh)
    assert torch.ops.aten._is_any_true.default(d).full_tensor().item()


def test_muon_takes_whole_matrices(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_zeropower_via_newtonschulz"
    plain = getattr(_muon, name)
    if plain.__module__ == compiler.__name__:
        plain = plain.__closure__[0].cell_contents
    seen: list[type] = []

    def counted(grad: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(type(grad))
        return plain(grad, *args)

    monkeypatch.setattr(_muon, name, counted)
    compiler.orthogonalise_whole(lambda x: True)
    replaced = getattr(_muon, name)
    compiler.orthogonalise_whole(lambda x: False)
    assert getattr(_muon, name) is replaced
    x, settings = torch.randn(4, 3), ((3.4445, -4.775, 2.0315), 5, 1e-7)
    got = replaced(cut(x, mesh), *settings)
    assert torch.equal(got.full_tensor(), plain(x, *settings)) and seen == [torch.Tensor]
    assert torch.equal(replaced(x, *settings), plain(x, *settings))


def test_a_shard_becomes_another_and_stays_the_object(mesh: DeviceMesh) -> None:
    p = nn.Parameter(cut(torch.ones(2), mesh))
    moved = cut(torch.full((2,), 3.0, dtype=torch.float64), mesh)
    assert compiler.move_shard(p, moved) is p
    assert p.dtype == torch.float64 and p.to_local().tolist() == [3, 3]
    meta = cut(torch.ones(2, device="meta"), mesh)
    new = compiler.move_shard(p, meta)
    assert new is not p and new.is_meta and compiler.move_shard(p, meta) is new


def test_where_a_part_begins(mesh: DeviceMesh) -> None:
    d = cut(torch.arange(6.0).view(3, 2), mesh)
    starts, local = compiler.part_of(d)
    assert starts == [0, 0] and torch.equal(local, d.to_local())


def test_what_is_pickled_in_the_place_of_a_shard(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("__reduce_ex__", "__copy__"):
        if name in DTensor.__dict__:
            monkeypatch.delattr(DTensor, name)
    compiler.refuse_pickles(lambda x: torch.full((1,), 7.0))
    compiler.refuse_pickles(lambda x: x)  # once
    d = cut(torch.ones(2), mesh)
    assert pickle.loads(pickle.dumps(d)).tolist() == [7.0]
    assert isinstance(copy.copy(d), DTensor)
    for name in ("__reduce_ex__", "__copy__"):
        delattr(DTensor, name)


def test_states_that_are_loaded_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_process_value_according_to_param_policy"
    plain = getattr(Optimizer, name)
    if plain.__module__ == compiler.__name__:
        plain = plain.__closure__[1].cell_contents
    monkeypatch.setattr(Optimizer, name, staticmethod(plain))
    compiler.cut_loaded_states(lambda p, value: value * 0 + 9)
    replaced = getattr(Optimizer, name)
    compiler.cut_loaded_states(lambda p, value: value)
    assert getattr(Optimizer, name) is replaced
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([p])
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    state = optimizer.state[p]
    assert state["exp_avg"].tolist() == [9, 9] and state["step"].item() == 1
