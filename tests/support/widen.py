"""Exactness is judged in float64: on both sides every cast or dtype= to a narrower float type is
widened to float64."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Widen(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in NARROW:
            kwargs["dtype"] = torch.float64
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()
        if func in (torch.Tensor.to, torch.Tensor.type):
            args = tuple(
                torch.float64 if isinstance(a, torch.dtype) and a in NARROW else a for a in args
            )
        return func(*args, **kwargs)
