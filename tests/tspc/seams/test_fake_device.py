"""Fake tensors of a device that is not there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tspc.seams import fake_device

HERE = [sys.executable, "-c"]


def test_they_can_be_indexed_and_written() -> None:
    fake_device.allow("cuda")
    with FakeTensorMode():
        x = torch.empty(4, 6, device="cuda")
        x[:2] = x[2:]
        x.copy_(x + 1)
        assert x[0].device.type == "cuda" and x[:, None].shape == (4, 1, 6)
    assert fake_device._works("cuda") and fake_device._works("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch knows the device here")
def test_without_it_they_cannot() -> None:
    """Once there is a guard there is one: asked of a fresh process."""
    code = "from tspc.seams.fake_device import _works; print(_works('cuda'))"
    out = subprocess.run([*HERE, code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_it_says_what_is_missing() -> None:
    fresh = fake_device.allow.__wrapped__
    with mock.patch.object(fake_device, "_works", lambda kind: False):
        with (
            mock.patch.object(shutil, "which", lambda name: None),
            pytest.raises(RuntimeError, match="install g\\+\\+"),
        ):
            fresh("cuda")
        with pytest.raises(RuntimeError, match="no guard for 'nothing'"):
            fresh("nothing")
