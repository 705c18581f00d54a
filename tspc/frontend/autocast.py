"""Types made explicit: what autocast and `param_dtype` do to each op becomes cast nodes.

In: a graph traced before dispatch, where autocast shows only in the results' dtypes, and the state
around it. Out: an equal graph that needs no state. The casts are torch's own: each op runs through
its autocast kernel, which casts and calls the op again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.node import Argument, Target

from tspc.base.context import Arguments, Keywords
from tspc.seams.tensors import (
    DisableAutocast,
    DisableTorchFunction,
    DispatchKey,
    FunctionalTensorMode,
    OpOverload,
    enter_autocast,
    exit_autocast,
    has_kernel,
    tree_leaves,
    tree_map,
)

aten = torch.ops.aten
Value = TypeVar("Value")
State = dict[str, torch.dtype]  # device type -> the dtype that its autocast casts to
KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU"}
off: Callable[[], AbstractContextManager[None]] = DisableAutocast


def ambient() -> State:
    """The autocast that a caller is in."""
    return {d: torch.get_autocast_dtype(d) for d in KEYS if torch.is_autocast_enabled(d)}


def explicit(
    gm: torch.fx.GraphModule, state: State, inputs: Sequence[object]
) -> torch.fx.GraphModule:
    """The graph with every cast a node; `gm` itself where no op of it is under autocast."""
    while state or _enters(gm):
        with ExitStack() as stack:
            for device in ambient():
                stack.enter_context(torch.autocast(device, enabled=False))
            run = _Explicit(gm, state).run
            gm = make_fx(run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(
                *inputs
            )
        state = {}
    for target in (exit_autocast, enter_autocast):  # where nothing is cast, to end it does nothing
        for n in gm.graph.find_nodes(op="call_function", target=target):
            gm.graph.erase_node(n)
    return gm


def _enters(gm: torch.fx.GraphModule) -> bool:
    entered = gm.graph.find_nodes(op="call_function", target=enter_autocast)
    return any(len(n.args) < 3 or n.args[2] for n in entered)


class Entered(torch.fx.Interpreter):
    """Runs a graph for a trace, in the autocast that its nodes enter: the trace alone only records
    them, and a cast that the model makes of what autocast made would seem to do nothing."""

    def __init__(self, gm: torch.fx.GraphModule):
        super().__init__(gm)
        self.stack: list[torch.autocast] = []

    def run(self, *args: object, **kwargs: Any) -> object:
        try:
            return super().run(*args, **kwargs)
        finally:
            while self.stack:  # after an error
                self.stack.pop().__exit__(None, None, None)

    def call_function(self, target: Target, args: Arguments, kwargs: Keywords) -> object:
        if target is enter_autocast:
            self.stack.append(torch.autocast(*args))
            return self.stack[-1].__enter__()
        if target is exit_autocast:
            return self.stack.pop().__exit__(None, None, None)
        return super().call_function(target, args, kwargs)


@contextmanager
def _set(states: Mapping[str, torch.dtype]) -> Iterator[None]:
    """The dtypes that autocast kernels cast to, without autocast itself."""
    before = {d: torch.get_autocast_dtype(d) for d in states}
    try:
        for d, dtype in states.items():
            torch.set_autocast_dtype(d, dtype)
        yield
    finally:
        for d, dtype in before.items():
            torch.set_autocast_dtype(d, dtype)


class _Explicit(torch.fx.Interpreter):
    """Runs a graph under the autocast that its nodes say."""

    def __init__(self, gm: torch.fx.GraphModule, state: State):
        super().__init__(gm)
        self.states = [state]
        self.expected: object = None

    def run_node(self, n: torch.fx.Node) -> object:
        if n.target is enter_autocast:
            return self._enter(*n.args)
        if n.target is exit_autocast:
            self.states.pop()
            return None
        self.expected = n.meta.get("val")
        return super().run_node(n)

    def _enter(
        self, device: Argument, dtype: Argument = None, enabled: Argument = True, _: object = None
    ) -> None:
        assert isinstance(device, str)
        state = {d: t for d, t in self.states[-1].items() if d != device}
        if enabled:
            fixed = isinstance(dtype, torch.dtype)
            state[device] = dtype if fixed else torch.get_autocast_dtype(device)
        self.states.append(state)

    def call_function(self, target: Target, args: Arguments, kwargs: Keywords) -> object:
        state = self.states[-1]
        if not state or not isinstance(target, OpOverload):
            return super().call_function(target, args, kwargs)
        expected = self.expected
        device = expected.device.type if isinstance(expected, torch.Tensor) else next(iter(state))
        if device not in state:
            return super().call_function(target, args, kwargs)
        key = KEYS[device]
        if has_kernel(target.name(), key):
            with _set(state):
                return _kernel(target, key, args, kwargs)
        composite = target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
        if composite and self._casts_inside(target, args, kwargs):
            return self._opened(target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def _casts_inside(self, target: OpOverload, args: Arguments, kwargs: Keywords) -> bool:
        """The result is not what the op gives without autocast."""
        if not isinstance(self.expected, torch.Tensor):
            return False
        dtype = self.expected.dtype
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if all(x.dtype == dtype or not x.is_floating_point() for x in operands):
            return False
        with disable_proxy_modes_tracing():
            try:
                return target(*args, **kwargs).dtype != dtype
            except RuntimeError:  # operands of unlike types, which autocast makes one
                return True

    def _opened(self, target: OpOverload, args: Arguments, kwargs: Keywords) -> object:
        """An op made of others that autocast meets one by one."""
        if target is aten.cross_entropy_loss.default:  # kept whole, in the type of its loss
            assert isinstance(self.expected, torch.Tensor)
            return target(aten.to.dtype(args[0], self.expected.dtype), *args[1:], **kwargs)
        with ExitStack() as stack:
            for d, dtype in self.states[-1].items():
                stack.enter_context(torch.autocast(d, dtype=dtype, cache_enabled=False))
            return _kernel(target, "CompositeImplicitAutograd", args, kwargs)


def _kernel(op: OpOverload, key: str, args: Arguments, kwargs: Keywords) -> object:
    with DisableTorchFunction():  # the tracer's mode would drop the key
        return op._op_dk(getattr(DispatchKey, key), *args, **kwargs)


class OneType(FunctionalTensorMode):
    """Functionalizes a model whose parameters are cast to `dtype`: an op that takes one type and is
    given several computes in it; others promote."""

    def __init__(self, dtype: torch.dtype | None):
        super().__init__(pre_dispatch=True, export=True)
        self.dtype = dtype

    def cast(self, x: Value) -> Value | torch.Tensor:
        """A float tensor in `dtype`, all else as it is."""
        if self.dtype is None or not isinstance(x, torch.Tensor):
            return x
        return x.to(self.dtype) if x.is_floating_point() and x.dtype != self.dtype else x

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if self.dtype is not None and not _promotes(func):
            operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            if len({x.dtype for x in operands if x.is_floating_point()}) > 1:
                with self:
                    args, kwargs = tree_map(self.cast, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _promotes(op: OpOverload) -> bool:
    """The op takes operands of several types."""
    return torch.Tag.pointwise in op.tags or op in (aten.cat.default, aten.stack.default)
