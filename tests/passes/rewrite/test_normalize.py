"""The normal form of programs: from text to text, and each rewrite keeps the values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.goldens import cases, check
from tests.support.programs import agree, inputs, ops, program_of
from tests.support.samples import x
from tspc.ir.builder import Builder
from tspc.ir.program import Node, Program, Ref, Type
from tspc.passes.rewrite.normalize import all_dims, normalize

aten = torch.ops.aten
Tensor = torch.Tensor
A, B = x(3, 10, 4), x(3, 10, 4)
FLAGS = torch.arange(30).view(3, 10) % 3 == 0


@cases("normalize")
def test_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)


def attend(q: Tensor, k: Tensor, *others: Any) -> Tensor:
    return aten.scaled_dot_product_attention.default(q, k, k, *others)


def filled(a: Tensor) -> Tensor:
    return a + aten.new_full.default(a * 2, [4], 3.0)


def narrow_loss(a: Tensor) -> Tensor:
    half = a.to(torch.bfloat16)
    return aten.logsumexp.default(half, [-1]) * 1


def written(a: Tensor, b: Tensor) -> Tensor:
    out = aten.slice_scatter.default(torch.zeros(3, 10, 4, dtype=a.dtype), a[:, :6], 1, 0, 6)
    return aten.slice_scatter.default(out, b[:, 6:], 1, 6, 10)


def written_in_part(a: Tensor, b: Tensor) -> Tensor:
    return aten.slice_scatter.default(a, b[:, 6:], 1, 6, 10)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], list[str]]] = {
    "slices of all": (lambda a: aten.slice.Tensor(a, 1, 0, 10) * 2, (A,), ["mul.Tensor"]),
    "views of the same shape": (lambda a: a.view(3, 10, 4).sin(), (A,), ["sin"]),
    "copies": (lambda a: a.clone().contiguous().sin(), (A,), ["sin"]),
    "a cast to the same type": (lambda a: aten.to.dtype(a, a.dtype).sin(), (A,), ["sin"]),
    "a cast that was made before": (
        lambda a: aten.to.dtype(a, torch.float32) + aten.to.dtype(a, torch.float32),
        (A,),
        ["to.dtype", "add.Tensor"],
    ),
    "a concatenation of one part": (
        lambda a: aten.cat.default([a[:, :0], a], 1).sin(),
        (A,),
        ["sin"],
    ),
    "copy": (
        lambda a, b: aten.copy.default(a, b[0, 0]),
        (A, B),
        ["select.int", "select.int", "expand"],
    ),
    "ranges that are all of it": (written, (A, B), ["slice.Tensor", "slice.Tensor", "cat"]),
    "a range that is a part": (written_in_part, (A, B), ["slice.Tensor", "slice_scatter"]),
    "beta and alpha": (
        lambda a, b: aten.addmm.default(a[0, :, 0], a[0], b[0].T, beta=2, alpha=3),
        (A, B),
        ["select.int", "select.int", "select.int", "select.int", "numpy_T", "mm"]
        + ["mul.Scalar", "mul.Scalar", "add.Tensor"],
    ),
    "a bias without factors": (
        lambda a, b: aten.addmm.default(a[0, :, 0], a[0], b[0].T),
        (A, B),
        ["select.int", "select.int", "select.int", "select.int", "numpy_T", "addmm"],
    ),
    "values where a flag is": (
        lambda a, f, v: aten.index_put.default(a, [f], v),
        (A, FLAGS, torch.tensor(7.0, dtype=torch.float64)),
        ["unsqueeze", "where.self"],
    ),
    "same padding": (
        lambda a, w: aten.conv2d.padding(a[None], w, None, [1, 1], "same"),
        (x(3, 6, 6), x(2, 3, 3, 3)),
        ["unsqueeze", "conv2d"],
    ),
    "attention without heads": (
        lambda a, b: attend(a, b),
        (A, B),
        ["unsqueeze"] * 3 + ["tspc.scaled_dot_product_attention", "squeeze.dim"],
    ),
    "a mask of one row": (
        lambda a, b, f: attend(a[:, None], b[:, None], f),
        (A, B, FLAGS[:1]),
        ["unsqueeze", "unsqueeze", "tspc.scaled_dot_product_attention"],
    ),
    "an embedding by keywords": (
        lambda w, i: aten.embedding.default(w, i, scale_grad_by_freq=True),
        (x(11, 4), torch.arange(5)),
        ["embedding"],
    ),
    "a filled tensor": (filled, (A,), ["new_full", "add.Tensor"]),
    "a logarithm in half precision": (
        narrow_loss,
        (A,),
        ["to.dtype", "to.dtype", "logsumexp", "to.dtype", "mul.Tensor"],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_rewrite_keeps_the_values(name: str) -> None:
    fn, tensors, wanted = FUNCTIONS[name]
    program = program_of(fn, *tensors)
    after = normalize(program)
    assert [o for o in ops(after) if o != "detach"] == wanted
    agree(program, after, 1e-2 if "half" in name else 1e-12, **inputs(*tensors))


def test_an_embedding_has_its_flags_as_arguments() -> None:
    fn, tensors, _ = FUNCTIONS["an embedding by keywords"]
    (node,) = (n for n in normalize(program_of(fn, *tensors)).nodes if n.is_call)
    assert node.args[2:] == (-1, True) and not node.kwargs


@pytest.mark.parametrize("at,end", [(2, 3), (-1, 2**63 - 1)])
@pytest.mark.parametrize("passed", ["detach", "detach_", "alias", "clone"])
def test_a_constant_index_of_one_row_is_a_slice(at: int, end: int, passed: str) -> None:
    program = Program.parse(f"""program 'p'
%x0: f64[3, 10, 4] = input()
%at: i64[1] = constant(value=[{at}])
%copy: i64[1] = aten.lift_fresh_copy.default(%at)
%same: i64[1] = aten.{passed}.default(%copy)
%row: f64[3, 1, 4] = aten.index.Tensor(%x0, (None, %same))
%output = output(%row)""")
    after = normalize(program)
    assert [n.args[1:] for n in after.nodes if n.is_call] == [(1, at, end)]
    agree(program, after, x0=A)


def test_a_filled_tensor_hangs_on_an_input_alone() -> None:
    after = normalize(program_of(filled, A))
    node = next(n for n in after.nodes if n.op == aten.new_full.default)
    assert node.args[0] == Ref("x0") and node.kwargs["dtype"] == torch.float64


def test_each_use_of_a_parameter_has_its_own_cast() -> None:
    def fn(a: Tensor, w: Tensor) -> Tensor:
        narrow = aten.to.dtype(w, torch.float32)
        return a.float() * narrow + narrow.sin()

    program = program_of(fn, x(4), params={"w": x(4)})
    casts = [n for n in normalize(program).nodes if n.refs() == [Ref("w")]]
    assert len(casts) == 2 and len({n.name for n in casts}) == 2


def test_what_is_refused_stays() -> None:
    program = program_of(lambda a: a.clone().sin(), A)
    (copy,) = (n.name for n in program.nodes if n.op == aten.clone.default)
    assert ops(normalize(program, {copy})) == ["clone", "sin"]


def test_a_mask_gets_dims_of_heads() -> None:
    node = Node("y", "attend", types=(Type((3, 2, 10, 4), torch.float64),))
    for shape, wanted in (((10,), (1, 10)), ((2, 10, 10), (1, 2, 10, 10))):
        mask = Node("m", "input", types=(Type(shape, torch.bool),))
        b = Builder({"m": mask})
        b.at(node)
        assert all_dims(b, Ref("m"), node) == Ref("y.mask0")
        assert [n.type.shape for n in b.nodes] == [wanted]
