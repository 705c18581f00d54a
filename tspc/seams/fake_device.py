"""Tensors of a device that is not there: ops on fake ones need a guard of its kind, which a build
of torch without that device has none of."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import FakeTensorMode

_SOURCE = """#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar guard(
    c10::DeviceType::{kind}, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::{kind}>());
"""


@lru_cache(maxsize=8)
def allow(kind: str) -> None:
    """From now on fake tensors of this kind of device can be indexed and copied; nothing where
    torch knows it. Raises `RuntimeError` where there is no C++ compiler.

    kind: as of a `torch.device`.
    """
    if _works(kind):
        return
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError(
            f"fake tensors of {kind!r} on a machine without one need a C++ compiler: install g++"
        )
    root = Path(torch.__file__).parent
    source = _SOURCE.format(kind=kind.upper())
    name = hashlib.sha256(f"{source}{torch.__version__}{compiler}".encode()).hexdigest()[:16]
    library = Path(cache_dir(), f"tspc_{kind}_{name}.so")
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            text, out = Path(folder, "guard.cpp"), Path(folder, "guard.so")
            text.write_text(source)
            flags = ["-O0", "-shared", "-fPIC", "-std=c++20", f"-I{root}/include", f"-L{root}/lib"]
            done = subprocess.run(
                [compiler, *flags, str(text), "-o", str(out), "-lc10"],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"no guard for {kind!r} could be compiled: {done.stderr[-400:]}")
            out.replace(library)
    ctypes.CDLL(str(library))


def _works(kind: str) -> bool:
    with FakeTensorMode():
        try:
            torch.empty(2, device=kind)[:1]
        except RuntimeError:
            return False
    return True
