"""Private torch APIs that tspc uses, one function each; `tests/test_torch_seams.py` fails first
when torch changes them."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn as nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis
from torch._dynamo.symbolic_convert import InstructionTranslator


class RestartTrace(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):
    """Raised by a backend: Dynamo traces the frame again.

    The first base passes through Dynamo's wrapper of backend errors; the second clears its
    speculation log.
    """


def real_tensors(gm: torch.fx.GraphModule) -> list[tuple[str, torch.Tensor]]:
    """(source, tensor) of every graph input of a Dynamo graph that is a real tensor."""
    out = []
    for node in gm.graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        example = getattr(argument, "example", None) if argument is not None else None
        if isinstance(example, torch.Tensor):
            source = node._dynamo_source.name
            out.append((source() if callable(source) else source, example))
    return out


def compiled_roots(gm: torch.fx.GraphModule) -> list[nn.Module]:
    """The module handed to torch.compile, and the outermost modules that own the graph's
    parameters."""
    roots: dict[int, nn.Module] = {}
    frame: Any = sys._getframe(1)
    found: nn.Module | None = None
    while frame is not None:
        if frame.f_code is OptimizedModule.__call__.__code__:
            found = frame.f_locals["self"]._orig_mod
        elif frame.f_code.co_name == "compile_wrapper":
            owner = getattr(frame.f_locals.get("fn"), "__self__", None)
            found = owner if isinstance(owner, nn.Module) else found
        frame = frame.f_back
    if found is not None:
        roots[id(found)] = found
    translator = InstructionTranslator.current_tx().output.root_tx
    scope = {"L": translator.f_locals, "G": translator.f_globals}
    cache: dict[Any, Any] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        source, chain = getattr(node, "_dynamo_source", None), []
        while source is not None:
            chain.append(source)
            source = getattr(source, "base", None)
        for s in reversed(chain):
            try:
                value = s.get_value(globals=scope, locals=scope, cache=cache)
            except Exception:  # a source that cannot be evaluated here is no module
                continue
            if isinstance(value, nn.Module):
                owned = {id(m) for r in roots.values() for m in r.modules()}
                if id(value) not in owned:
                    roots[id(value)] = value
                break
    return list(roots.values())


def storage_key(x: torch.Tensor) -> int:
    """One number per storage, the same for all views of it; 0 without one."""
    return x.untyped_storage()._cdata if torch._C._has_storage(x) else 0
