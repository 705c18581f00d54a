"""Runs a script as `python` does, with the backend's pieces uncompiled (Inductor takes minutes for
what lasts seconds; $COMPILER says otherwise) and in float64 (with --bf16: float32): `run_script.py
SCRIPT ARGUMENTS`."""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import torch

from tspc.backend import tsp as backend
from tspc.base import options

if __name__ == "__main__":
    parse = options.parse

    def compiled_by(given: Any) -> options.Options:
        return parse({"compiler": os.environ.get("COMPILER", "eager"), **(given or {})})

    backend.parse = compiled_by
    if "--bf16" not in sys.argv:  # autocast leaves float64 alone
        torch.set_default_dtype(torch.float64)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
