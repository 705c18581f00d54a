"""torch's private symbols of its compilers: those that are functions do what is taken of them."""

from __future__ import annotations

import torch

from tspc.seams import lowering


def test_all_that_is_named_is_there() -> None:
    assert len(lowering.__all__) == len(set(lowering.__all__)) > 25
    assert all(hasattr(lowering, n) for n in lowering.__all__)


def test_modes_of_inductor() -> None:
    modes = lowering.list_mode_options()
    assert {"default", "max-autotune"} <= set(modes) and isinstance(modes["default"], dict)


def test_a_boxed_function_takes_a_list() -> None:
    boxed = lowering.make_boxed_func(lambda a, b: [a + b])
    assert boxed([1, 2]) == [3]


def test_what_a_table_of_decompositions_has() -> None:
    table = lowering.select_decomp_table()
    assert torch.ops.aten.native_layer_norm.default in table


def test_a_joint_graph_is_cut_in_forward_and_backward() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        return [(x @ w).sin().sum()]

    x, w = torch.ones(2, 3, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    joint = lowering.aot_export_joint_simple(fn, [x, w], trace_joint=True)
    ((loss, *_), grads) = joint([x, w], [torch.ones(())])
    assert loss.item() == (x @ w).sin().sum().item()
    wanted = torch.autograd.grad((x @ w).sin().sum(), [x, w])
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted))


def test_a_context_of_tracing_is_there_while_it_lasts() -> None:
    assert lowering.TracingContext.try_get() is None
    context = lowering.TracingContext(None)
    with lowering.tracing(context):
        assert lowering.TracingContext.try_get() is context


def test_counters_count_by_group_and_name() -> None:
    before = lowering.counters["tspc test"]["n"]
    lowering.counters["tspc test"]["n"] += 1
    assert lowering.counters["tspc test"]["n"] == before + 1
    assert lowering.cache_dir()
