"""torch's private symbols of ops and tensors do what the product takes them for."""

from __future__ import annotations

import pytest
import torch

from tspc.seams import tensors

aten = torch.ops.aten


def test_all_that_is_named_is_there() -> None:
    assert len(tensors.__all__) == len(set(tensors.__all__)) > 30
    assert all(hasattr(tensors, n) for n in tensors.__all__)


def test_ops_and_packets() -> None:
    assert isinstance(aten.add.Tensor, tensors.OpOverload)
    assert isinstance(aten.add, tensors.OpOverloadPacket)
    assert isinstance(torch.ops.higher_order.cond, tensors.HigherOrderOperator)
    assert tensors.has_kernel("aten::mm", "AutocastCPU")
    assert not tensors.has_kernel("aten::relu", "AutocastCPU")


def test_autocast_can_be_entered_left_and_disabled() -> None:
    x = torch.ones(2, 2)
    mode = tensors.enter_autocast("cpu", torch.bfloat16, True, False)
    assert (x @ x).dtype == torch.bfloat16
    with tensors.DisableAutocast():
        assert (x @ x).dtype == torch.float32
    tensors.exit_autocast(mode)
    assert (x @ x).dtype == torch.float32


def test_fake_tensors_have_no_values() -> None:
    with tensors.FakeTensorMode() as mode:
        x = torch.ones(2, 3)
        assert isinstance(x, tensors.FakeTensor) and x.fake_mode is mode
        with tensors.unset_fake_temporarily():
            assert not isinstance(torch.ones(2), tensors.FakeTensor)


class Counting(tensors.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_see_ops_and_can_be_set_aside() -> None:
    with Counting() as mode:
        torch.ones(2).add(1)
        with tensors.no_modes():
            torch.ones(2).mul(2)
    assert mode.ops == [aten.ones.default, aten.add.Tensor]


def test_trees_of_values() -> None:
    tree = {"a": [1, (2, 3)], "b": 4}
    assert tensors.tree_leaves(tree) == [1, 2, 3, 4]
    assert tensors.tree_map(lambda x: -x, tree) == {"a": [-1, (-2, -3)], "b": -4}
    leaves, spec = tensors.tree_flatten(tree)
    assert torch.utils._pytree.tree_unflatten(leaves, spec) == tree


def test_memory_and_backwards() -> None:
    assert tensors.has_storage(torch.ones(1)) and tensors.current_backward() == -1
    seen: list[int] = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda g: seen.append(tensors.current_backward()))
    x.sum().backward()
    assert seen[0] >= 0


def test_a_subclass_over_the_same_memory() -> None:
    class Plain(torch.Tensor):
        __torch_function__ = tensors.no_torch_function

    x = torch.arange(3.0)
    y = tensors.make_subclass(Plain, x)
    assert isinstance(y, Plain) and y.data_ptr() == x.data_ptr()
    assert type(y + 1) is torch.Tensor
    ordered = tensors.OrderedSet([3, 1, 3])
    assert list(ordered) == [3, 1]


def test_a_lock_is_held_by_one(tmp_path: object) -> None:
    path = f"{tmp_path}/lock"
    with tensors.FileLock(path), pytest.raises(TimeoutError):
        tensors.FileLock(path, timeout=0.01).acquire()
