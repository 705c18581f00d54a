"""Kernels of a block of attention: which takes what, alike with what is written out, in tiles, and
on devices that are not here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tspc.runtime.attention import table
from tspc.runtime.attention.blocks import View
from tspc.runtime.attention.table import CPU, KERNELS, WRITTEN, Case
from tspc.seams.fake_device import allow

Tensor = torch.Tensor
ROWS = 9


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def operands(groups: int = 1, width: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a cotangent of what they give."""
    heads = 4 // groups
    return (
        draw(2, 4, ROWS, 6),
        draw(2, heads, ROWS, 6),
        draw(2, heads, ROWS, width),
        draw(2, 4, ROWS, width),
    )


HIDDEN = torch.rand(2, 1, ROWS, ROWS) > 0.4
HIDDEN[:, :, 3] = False
VIEWS = {
    "all": View(scale=0.4),
    "causal": View(True, scale=0.4),
    "a mask": View(mask=HIDDEN, scale=0.4),
    "one row of a mask": View(mask=HIDDEN[:, :, :1], scale=0.4),
    "a mask that is added": View(mask=draw(1, 4, ROWS, ROWS), scale=0.4),
}
WRITTEN_ONLY = {
    "dropped": View(True, factors=(torch.rand(2, 4, ROWS, ROWS) > 0.3) * 2.0),
    "a score": View(score="aten.mul(aten.tanh(s), 2.0)", scale=0.4),
    "below a top": View(
        mask=draw(2, 1, ROWS, ROWS) - 1e12, top=torch.full((2, 1, ROWS, 1), -1e12), scale=0.4
    ),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", VIEWS)
def test_the_fused_kernel_is_what_is_written_out(name: str, groups: int) -> None:
    q, k, v, g = operands(groups)
    view = VIEWS[name]
    kernel, grouped = table.chosen(q, k, v, view)
    assert kernel is CPU
    out, lse = table.forward(q, k, v, view)
    back = table.backward(g, q, k, v, out, table.finite(lse), view)
    full = table.repeated(k, groups), table.repeated(v, groups)
    wanted = WRITTEN.forward(q, *full, view)
    torch.testing.assert_close((out, lse), wanted)
    dq, dk, dv = WRITTEN.backward(g, q, *full, out, table.finite(lse), view)
    expected = dq, table.summed(dk, groups), table.summed(dv, groups)
    torch.testing.assert_close(tuple(back), expected)


@pytest.mark.parametrize("rows", [1, 4, ROWS])
@pytest.mark.parametrize("name", {**VIEWS, **WRITTEN_ONLY})
def test_tiles_of_queries_are_the_whole(name: str, rows: int) -> None:
    q, k, v, g = operands()
    view = {**VIEWS, **WRITTEN_ONLY}[name]
    ends = []
    for tile in (rows, 2 * ROWS):
        with mock.patch.object(table, "TILE", tile * 8 * ROWS):
            assert len(list(table._tiles(q, k))) == -(-ROWS // tile)
            out, lse = WRITTEN.forward(q, k, v, view)
            added = [torch.zeros(2, 1, n, ROWS, dtype=torch.float64) for n in (1, ROWS)]
            for a in added:
                biased = replace(view, added=a)
                assert not biased.is_plain
                grads = WRITTEN.backward(g, q, k, v, out, table.finite(lse), biased)
            ends.append((out, lse, *grads, *added))
    torch.testing.assert_close(*ends)


def test_written_out_it_is_a_softmax() -> None:
    q, k, v, g = (x.requires_grad_() for x in operands())
    scores = (q @ k.transpose(-1, -2)) * 0.4
    scores = scores.masked_fill(torch.ones(ROWS, ROWS).triu(1).bool(), -math.inf)
    wanted = scores.softmax(-1) @ v
    grads = torch.autograd.grad(wanted, (q, k, v), g)
    with torch.no_grad():
        out, lse = WRITTEN.forward(q, k, v, VIEWS["causal"])
        back = WRITTEN.backward(g, q, k, v, out, lse, VIEWS["causal"])
    torch.testing.assert_close((out, lse), (wanted.detach(), scores.logsumexp(-1).detach()))
    torch.testing.assert_close(tuple(back), grads)


def test_a_query_that_sees_nothing() -> None:
    q, k, v, _ = operands()
    for kernel in (CPU, WRITTEN):
        out, lse = kernel.forward(q, k, v, VIEWS["a mask"])
        assert (lse[:, :, 3] == -math.inf).all() and not out[:, :, 3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_stays(dtype: torch.dtype) -> None:
    q, k, v, g = (x.to(dtype) for x in operands())
    exact = WRITTEN.forward(q.double(), k.double(), v.double(), VIEWS["causal"])
    for kernel in (CPU, WRITTEN):
        out, lse = kernel.forward(q, k, v, VIEWS["causal"])
        assert out.dtype == dtype and lse.dtype == torch.float32
        torch.testing.assert_close(lse.double(), exact[1], atol=2e-2, rtol=2e-2)
        assert kernel.backward(g, q, k, v, out, lse, VIEWS["causal"])[0].shape == q.shape


CASE = Case(torch.device("cpu"), torch.float32, 8, 8, False, False, False)


def test_a_kernel_that_is_wrong_here_is_left_out() -> None:
    """In its units, its gradients, its shapes, or because the device refuses it."""

    def refuses(*args: Any) -> Any:
        raise RuntimeError("not on this device")

    def in_bits(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = CPU.forward(*args)
        return out, lse / math.log(2)

    def doubled(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = CPU.backward(*args)
        return dq, dk, 2 * dv

    def padded(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = CPU.forward(*args)
        return out, torch.nn.functional.pad(lse, (0, 1))

    wrong = [
        replace(CPU, forward=refuses),
        replace(CPU, forward=in_bits),
        replace(CPU, forward=padded),
        replace(CPU, backward=doubled),
    ]
    for kernel in wrong:
        assert not table._agrees(kernel, CASE)
        assert table._chosen(CASE, (kernel,), False) == (WRITTEN, False)
    assert table._agrees(CPU, CASE) and table._agrees(WRITTEN, replace(CASE, masked=True))
    assert table._chosen(CASE, (*wrong, CPU), False) == (CPU, False)


def test_the_diagonal_begins_at_the_first_query() -> None:
    """A kernel that lays it at the last one is right where there are as many keys."""

    def last(q: Tensor, k: Tensor, v: Tensor, b: View) -> tuple[Tensor, Tensor]:
        return WRITTEN.forward(q, k, v, replace(b, first=k.shape[2] - q.shape[2]))

    def last_backward(*args: Any) -> Any:
        *tensors, b = args
        rows, keys = tensors[1].shape[2], tensors[2].shape[2]
        return WRITTEN.backward(*tensors, replace(b, first=keys - rows))

    kernel = replace(WRITTEN, forward=last, backward=last_backward)
    causal = replace(CASE, causal=True)
    assert table._agrees(kernel, causal)
    assert not table._agrees(kernel, replace(causal, square=False))
    for square in (True, False):
        assert table._agrees(CPU, replace(causal, square=square))


def test_heads_are_repeated_where_a_kernel_takes_as_many_only() -> None:
    even = replace(CPU, takes=lambda case: not case.grouped)
    q, k, v, g = operands(2)
    wanted = table.forward(q, k, v, VIEWS["causal"])
    grads = table.backward(g, q, k, v, *wanted, VIEWS["causal"])
    with mock.patch.object(table, "KERNELS", (even,)):
        assert table.chosen(q, k, v, VIEWS["causal"]) == (even, False)
        torch.testing.assert_close(table.forward(q, k, v, VIEWS["causal"]), wanted)
        back = table.backward(g, q, k, v, *wanted, VIEWS["causal"])
        torch.testing.assert_close(tuple(back), tuple(grads))


GPU = replace(CASE, device=torch.device("cuda"), dtype=torch.bfloat16, d=64, dv=64)
ENTRIES = {
    "flash": GPU,
    "flash, causal": replace(GPU, causal=True),
    "flash, few heads": replace(GPU, grouped=True),
    "memory-efficient": replace(GPU, masked=True),
    "memory-efficient, few heads": replace(GPU, masked=True, grouped=True),
    "memory-efficient, fp32": replace(GPU, dtype=torch.float32),
    "memory-efficient, narrow values": replace(GPU, dv=32),
    "memory-efficient, fewer keys than queries": replace(GPU, causal=True, square=False),
    "written out": replace(GPU, dtype=torch.float64),
    "written out, odd heads": replace(GPU, d=62, dv=62),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_each_entry_on_a_device_that_is_not_here(name: str) -> None:
    """Shapes and types; nothing that it does waits for a value."""
    case, rows = ENTRIES[name], 50
    keys = rows if case.square else 40
    allow("cuda")
    with FakeTensorMode():
        made = {"dtype": case.dtype, "device": "cuda"}
        heads = 2 if case.grouped else 8
        q, g = torch.empty(2, 8, rows, case.d, **made), torch.empty(2, 8, rows, case.dv, **made)
        k, v = (torch.empty(2, heads, keys, n, **made) for n in (case.d, case.dv))
        mask = torch.empty(2, 1, rows, keys, dtype=torch.bool, device="cuda")
        view = View(case.causal, mask if case.masked else None)
        assert table.chosen(q, k, v, view)[0].name == name.split(",")[0]
        out, lse = table.forward(q, k, v, view)
        assert out.shape == g.shape and lse.shape == q.shape[:-1]
        assert lse.dtype == torch.promote_types(case.dtype, torch.float32)
        for d, x in zip(table.backward(g, q, k, v, out, lse, view), (q, k, v)):
            assert d.shape == x.shape and d.device.type == "cuda"


def test_what_an_entry_does_not_take() -> None:
    flash = next(k for k in KERNELS if k.name == "flash")
    assert not flash.takes(replace(GPU, d=512, dv=512)) and not flash.takes(CASE)
    assert not CPU.takes(GPU) and not CPU.takes(replace(CASE, dv=4))


def test_rows_of_a_mask_begin_where_the_kernel_wants_them() -> None:
    q, k, _, _ = operands()
    for mask in (HIDDEN, HIDDEN[:, :, :1], draw(2, 4, ROWS, ROWS)):
        bias = table._bias(q, k, mask)
        assert bias is not None and bias.shape == (2, 4, ROWS, ROWS)
        assert bias.stride(-2) == 16 and bias.stride(-1) == 1
        assert torch.equal(bias, table._additive(mask, q).expand_as(bias))
    assert table._bias(q, k, None) is None


def test_masks_as_what_is_added() -> None:
    flags = torch.tensor([[True, False], [False, False]])
    added = table._additive(flags, draw(1))
    assert added is not None and added.tolist() == [[0, -math.inf], [-math.inf, -math.inf]]
    assert table._additive(None, draw(1)) is None
    assert table._sees_none(flags).tolist() == [False, True]
    assert table._sees_none(added).tolist() == [False, True]
    x = torch.arange(8.0).view(1, 4, 2)
    assert torch.equal(table.summed(table.repeated(x, 3), 3), x * 3)
