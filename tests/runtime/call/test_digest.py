"""64 bits of a tensor's contents: any bit and any change of places change them."""

from __future__ import annotations

import pytest
import torch

from tspc.runtime.call.digest import SMALL, digest, digest_there, is_plain

SIZES = (1, 7, 1000, SMALL // 4 + 3, 3 * (1 << 15) + 5)


@pytest.mark.parametrize("function", [digest, lambda x: int(digest_there(x))])
@pytest.mark.parametrize("size", SIZES)
def test_equal_contents_and_no_others(function, size: int) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(size, generator=torch.Generator().manual_seed(size))
    value = function(x)
    assert function(x.clone()) == value and -(2**63) <= value < 2**63
    for at in {0, size // 2, size - 1}:
        y = x.clone()
        y.view(torch.int32)[at] ^= 1
        assert function(y) != value
    if size > 2:
        y = x.clone()
        y[0], y[2] = x[2], x[0]
        assert function(y) != value


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float64],
    ids=str,
)
def test_any_type_and_stride(dtype: torch.dtype) -> None:
    x = (torch.randn(300, 70) * 3).round().clamp(min=0).to(dtype)
    assert digest(x.t()) == digest(x.t().contiguous()) != digest(x)
    assert int(digest_there(x[:, 3:])) == int(digest_there(x[:, 3:].clone()))
    assert digest(x.clone().requires_grad_(dtype.is_floating_point)) == digest(x)


def test_negative_and_conjugate_bits_are_resolved() -> None:
    x = torch.randn(5, dtype=torch.complex64)
    assert digest(x.conj()) == digest(x.conj().resolve_conj()) != digest(x)
    assert digest(x.conj().imag) == digest(x.conj().imag.clone())


def test_what_can_be_read() -> None:
    assert is_plain(torch.ones(2)) and is_plain(torch.nn.Parameter(torch.ones(2)))
    assert not is_plain(torch.eye(2).to_sparse())

    class Other(torch.Tensor):
        pass

    assert not is_plain(torch.ones(2).as_subclass(Other))
