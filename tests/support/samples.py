"""What one-op samples are made of, and those of ops that sort, place and convolve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tspc.ops.attention import ATTENTION
from tspc.ops.sequence import SEQUENCE_CONV

aten = torch.ops.aten
Sample = tuple[Callable[..., Any], Sequence[torch.Tensor]]

GENERATOR = torch.Generator().manual_seed(0)


def x(*shape: int) -> torch.Tensor:
    """Random numbers, the same for the same shape and order of calls."""
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def ids(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=GENERATOR)


def of(op: Any, *args: Any, **kwargs: Any) -> Sample:
    """A sample of one op: tensors among the arguments are the operands."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]

    def fn(*given: torch.Tensor) -> Any:
        rest = iter(given)
        return op(*(next(rest) if isinstance(a, torch.Tensor) else a for a in args), **kwargs)

    return fn, tensors


def sorts() -> list[Sample]:
    a = x(3, 5, 7)
    return [
        of(aten.topk.default, a, 2, 1),
        of(aten.topk.default, a, 3),
        of(aten.topk.default, a, 1, 1),
        of(aten.sort.default, a, 1),
        of(aten.sort.stable, a, stable=True, dim=-1),
        of(aten.cummax.default, a, 1),
        of(aten.cummin.default, a, -1),
        of(aten.cumprod.default, a, 1),
        of(aten.logcumsumexp.default, a, 1),
        of(aten.amin.default, a, [1]),
        of(aten.min.dim, a, 1),
        of(aten.argmin.default, a, 1),
        of(aten.aminmax.default, a, dim=1),
        of(aten.median.dim, a, 1),
        of(aten.kthvalue.default, a, 2, 1),
        of(aten.prod.dim_int, a, 1),
        of(aten.var.correction, a, [1], correction=1),
        of(aten.std.correction, a, [0, 2], correction=0, keepdim=True),
        of(aten.linalg_vector_norm.default, a, 2, [-1]),
        of(aten.linalg_vector_norm.default, a, 1, [0, 1], True),
        of(aten.norm.ScalarOpt_dim, a, 2, [1], True),
        of(aten.log_sigmoid.default, a),
        of(aten.outer.default, x(5), x(7)),
        of(aten.tril.default, x(3, 5, 5)),
        of(aten.triu.default, a, 1),
    ]


def places() -> list[Sample]:
    a, at = x(3, 10, 7), torch.arange(4).view(1, 4, 1)
    step, some = at.expand(3, 4, 7).contiguous(), at.expand(2, 4, 5).contiguous()

    def into_zeros(op: Any) -> Callable[..., Any]:
        return lambda p, i: op(torch.zeros(3, 10, 7, dtype=p.dtype), 1, i, p)

    def hot(p: torch.Tensor) -> torch.Tensor:
        return aten.one_hot.default(aten.argmax.default(p, -1), 7)

    def put(accumulate: bool) -> Callable[..., Any]:
        return lambda p, v, *i: aten.index_put.default(p, list(i), v, accumulate)

    def put_into_zeros(v: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return aten.index_put.default(torch.zeros(3, 10, 7, dtype=v.dtype), [i], v)

    def put_behind(p: torch.Tensor, v: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return aten.index_put.default(p, [None, i], v)

    return [
        (hot, (x(3, 5, 7),)),
        of(aten.index_select.default, a, 1, ids(10, 4)),
        of(aten.index_select.default, a, -1, ids(7, 11)),
        of(aten.scatter.src, a, 1, step, x(3, 4, 7)),
        of(aten.scatter.src, a, 1, some, x(3, 4, 7)),
        of(aten.scatter.src, a, 1, some, x(2, 4, 5)),
        of(aten.scatter.value, a, 1, step, 2.0),
        of(aten.scatter_add.default, a, 1, ids(10, 3, 4, 7), x(3, 4, 7)),
        of(aten.scatter_reduce.two, a, 1, ids(10, 3, 4, 7), x(3, 4, 7), "amax"),
        (into_zeros(aten.scatter_add.default), (x(3, 4, 7), ids(10, 3, 4, 7))),
        of(aten.index_add.default, a, 1, ids(10, 4), x(3, 4, 7)),
        of(aten.index_copy.default, a, 1, torch.arange(4), x(3, 4, 7)),
        (into_zeros(aten.index_add.default), (x(3, 4, 7), ids(10, 4))),
        (put(False), (a, x(2, 10, 7), torch.tensor([2, 0]))),
        (put(False), (a, x(2, 1, 7), torch.tensor([2, 0]))),
        (put(True), (a, x(4, 7), ids(3, 4), ids(10, 4))),
        (put(False), (a, x(7), torch.tensor([2, 0]))),
        (put_into_zeros, (x(2, 10, 7), torch.tensor([2, 0]))),
        (put_behind, (a, x(3, 2, 7), torch.tensor([2, 0]))),
    ]


def windows() -> list[Sample]:
    return [
        of(aten.conv1d.default, x(2, 3, 11), x(5, 3, 4), x(5), [2], [1]),
        of(aten.conv1d.default, x(2, 3, 11), x(5, 3, 4)),
        of(aten.conv1d.default, x(3, 11), x(5, 3, 4)),
        of(aten.conv1d.default, x(2, 6, 11), x(6, 1, 4), x(6), groups=6),
        of(aten.conv3d.default, x(2, 3, 4, 5, 6), x(5, 3, 2, 2, 2)),
        of(SEQUENCE_CONV, x(2, 3, 11), x(5, 3, 4), x(5), 3, 1, 1),
        of(SEQUENCE_CONV, x(2, 3, 11), x(5, 3, 4), None, 0, 2, 1),
        of(SEQUENCE_CONV, x(2, 6, 11), x(6, 1, 4), x(6), 1, 1, 0),
        of(SEQUENCE_CONV, x(2, 6, 11), x(4, 3, 4), x(4), 1, 1, 2),
    ]


def sinks() -> list[Sample]:
    q, k, v = x(3, 4, 5, 6), x(3, 4, 7, 6), x(3, 4, 7, 11)
    grouped = x(3, 6, 5, 7), x(3, 2, 5, 7), x(3, 2, 5, 7)
    return [
        of(ATTENTION, q, k, v, None, None, None, x(4)),
        of(ATTENTION, q, k, v, None, None, None, x(4), causal=True),
        of(ATTENTION, q, k, v, x(3, 1, 5, 7), None, None, x(4)),
        of(ATTENTION, q, k, v, x(5, 7), None, None, x(4)),
        of(ATTENTION, *grouped, x(6, 5, 5), None, None, x(6), causal=True, grouped=True),
    ]


MORE = {"sorts": sorts, "places": places, "windows": windows, "sinks": sinks}


def more_forbidden() -> list[tuple[str, Sample]]:
    """(role, sample): cutting the factors that have the role changes the values."""
    a = x(3, 5, 7)
    return [
        ("whole", of(aten.topk.default, a, 2, 1)),
        ("whole", of(aten.sort.default, a, 1)),
        ("whole", of(aten.tril.default, x(3, 5, 4))),
        ("whole", of(aten.linalg_vector_norm.default, a, 2, [1])),
        ("whole", of(aten.conv1d.default, x(2, 3, 11), x(5, 3, 4), x(5))),
        ("whole", of(SEQUENCE_CONV, x(2, 3, 11), x(5, 3, 4), x(5), 3, 1, 1)),
        ("halo", of(SEQUENCE_CONV, x(2, 6, 11), x(6, 1, 4), x(6), 3, 1, 0)),
        ("halo", of(aten.pad.default, a, [0, 0, 1, -1])),
        ("halo", of(aten.constant_pad_nd.default, a, [1, -1])),
        ("select", of(aten.index_select.default, a, 1, ids(5, 4))),
        (
            "exchange",
            of(ATTENTION, *(x(3, 4, 7, 6) for _ in range(3)), None, None, None, x(4)),
        ),
    ]
