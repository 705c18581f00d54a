"""Private torch APIs that tspc uses, one function each."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import _reconstruct as reconstruct  # pyright: ignore[reportAttributeAccessIssue]
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn as nn
from torch._decomp import decomposition_table
from torch._dynamo import eval_frame, external_utils, trace_rules
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.eval_frame import skip_code as skip_code  # by itself no graph of Dynamo's
from torch._dynamo.exc import (
    ShortenTraceback,
    TensorifyScalarRestartAnalysis,
    UnspecializeRestartAnalysis,
)
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch import predispatch
from torch._functorch._aot_autograd import graph_compile
from torch._guards import TracingContext
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor, Replicate, debug, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.experimental import register_sharding
from torch.optim import _muon
from torch.optim.optimizer import Optimizer

Function = TypeVar("Function", bound=Callable[..., object])
_TORCH = str(Path(torch.__file__).parent)
_TSPC = str(Path(__file__).parents[1])
FLEX = torch.ops.higher_order.flex_attention
NESTING = {  # the functions that open and close a loop of vmap in a Dynamo graph
    predispatch._vmap_increment_nesting: "open",
    predispatch._vmap_decrement_nesting: "close",
    predispatch.lazy_load_decompositions: "prepare",
}


class RestartTrace(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):
    """Raised by a backend: Dynamo traces the frame again.

    The first base passes through Dynamo's wrapper of backend errors; the second clears its
    speculation log.
    """


class _Plain(ShortenTraceback):
    """Passes through Dynamo's wrapper of backend errors; what it carries is raised outside."""

    def __init__(self, error: Exception):
        super().__init__(str(error), first_useful_frame=None)
        self.error = error

    def remove_dynamo_frames(self) -> Any:
        return self.error


def plainly(errors: type[Exception]) -> Callable[[Function], Function]:
    """Decorates a backend: these errors of it reach the caller of the compiled model as they
    are."""

    def decorate(backend: Any) -> Any:
        @functools.wraps(backend)
        def call(*args: object, **kwargs: object) -> object:
            try:
                return backend(*args, **kwargs)
            except errors as e:
                raise _Plain(e) from e

        return call

    return decorate


def outside_of_dynamo(fn: Function) -> Function:
    """`torch.compiler.disable`, which says of its result less than it is."""
    return torch.compiler.disable(fn)  # pyright: ignore[reportReturnType]


def uses(x: torch.Tensor) -> int:
    """How many hold it, autograd's graphs among them."""
    return x._use_count()  # pyright: ignore[reportAttributeAccessIssue]


def real_tensors(gm: torch.fx.GraphModule) -> list[tuple[str, torch.Tensor]]:
    """(source, tensor) of every graph input of a Dynamo graph that is a real tensor."""
    out = []
    for node in gm.graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        example = getattr(argument, "example", None) if argument is not None else None
        if isinstance(example, torch.Tensor):
            out.append((source_name(node), example))
    return out


def source_name(node: torch.fx.Node) -> str:
    """Where Dynamo has a graph input from, as Python code; "" where it does not say."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)


def replace_member(owner: object, name: str, value: object) -> None:
    """In the place of torch's own."""
    setattr(owner, name, value)


def compiled_roots(gm: torch.fx.GraphModule) -> list[nn.Module]:
    """The module handed to torch.compile, and the outermost modules that own the graph's
    parameters."""
    roots: dict[int, nn.Module] = {}
    frame: types.FrameType | None = sys._getframe(1)
    outermost: nn.Module | None = None
    while frame is not None:
        if frame.f_code is OptimizedModule.__call__.__code__:
            outermost = frame.f_locals["self"]._orig_mod
        elif frame.f_code.co_name == "compile_wrapper":
            owner = getattr(frame.f_locals.get("fn"), "__self__", None)
            outermost = owner if isinstance(owner, nn.Module) else outermost
        frame = frame.f_back
    if outermost is not None:
        roots[id(outermost)] = outermost
    translator = InstructionTranslator.current_tx().output.root_tx
    assert translator is not None
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


def parts_of(op: OpOverload) -> Callable[..., object]:
    """An op spelled out in other ops: torch's own kernel of a composite one, else the entry of its
    table of decompositions."""
    return op.decompose if op._can_decompose() else decomposition_table[op]


def on_compile(
    backend: object, wrap: Callable[[Callable[..., object], object, bool], object]
) -> None:
    """Whatever `torch.compile` makes with this backend becomes wrap(compiled, the module or
    function, strict).

    A module whose `forward` was replaced by a function that Dynamo skips (an autocast decorator
    around that of a library's class) gets one more frame, from which Dynamo follows it.
    """
    plain = eval_frame._TorchDynamoContext.__call__
    modules: list[nn.Module] = []

    @functools.wraps(plain)
    def make(self: Any, fn: Any) -> object:
        inner = eval_frame.innermost_backend(self.callback) if callable(self.callback) else None
        if getattr(inner, "compiler_fn", inner) is not backend or isinstance(fn, type):
            return plain(self, fn)
        if isinstance(fn, nn.Module):
            modules.append(fn)
            try:
                return plain(self, fn)
            finally:
                modules.pop()
        owner = getattr(fn, "__self__", None)
        root = owner if isinstance(owner, nn.Module) else modules[-1] if modules else fn
        forward = owner.forward if isinstance(owner, nn.Module) else root
        if isinstance(owner, nn.Module) and not isinstance(forward, types.MethodType):
            fn = external_utils.wrap_inline(fn) if trace_rules.check(forward) else fn
        options = getattr(inner, "kwargs", {}).get("options")
        strict = isinstance(options, dict) and options.get("strict") is True
        return wrap(plain(self, fn), root, strict)

    eval_frame._TorchDynamoContext.__call__ = make


def tracing() -> bool:
    """Whether Dynamo or a backend works, so that Python runs for their sake only."""
    return TracingContext.try_get() is not None


def why_not_forward(root: object) -> str:
    """Why Dynamo may have left a module's forward, or a function, to Python."""
    fn = root.forward if isinstance(root, nn.Module) else root
    general = _why()
    if general:
        return general
    if getattr(fn, "_torchdynamo_disable", False):
        return "it is under torch._dynamo.disable"
    if trace_rules.check(fn):
        code = getattr(fn, "__code__", None)
        at = f" in {code.co_filename}:{code.co_firstlineno}" if code is not None else ""
        return f"its code{at} is of a module that Dynamo skips"
    return 'TORCH_LOGS="dynamo" tells why'


def why_outside(uncompiled: bool) -> str:
    """Why a weight is read by Python here, and where: the user's file and line."""
    where, why = "", ""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        code, file = frame.f_code, frame.f_code.co_filename
        if code.co_name == "_fn" and file == eval_frame.__file__:
            why = why or "it is under torch._dynamo.disable"
        if not file.startswith((_TORCH, _TSPC)):
            where = where or f"{file}:{frame.f_lineno}"
            limit = torch._dynamo.config.recompile_limit
            if not why and eval_frame._get_total_cache_entry_count(code) >= limit:
                why = (
                    f"torch._dynamo.config.recompile_limit ({limit}) is reached by {code.co_name} "
                    f'({file}:{code.co_firstlineno}); TORCH_LOGS="recompiles" tells what changes'
                )
        frame = frame.f_back
    if uncompiled:
        why = "the module is called without torch.compile"
    left = 'Dynamo left it to Python; TORCH_LOGS="graph_breaks" tells why'
    return f"{where or 'torch'}: {why or _why() or left}"


def _why() -> str:
    if eval_frame._stance.stance != "default":
        return f"torch.compiler.set_stance({eval_frame._stance.stance!r}) is on"
    if torch._dynamo.config.suppress_errors:
        return "torch._dynamo.config.suppress_errors is on: the log tells the error"
    return ""


def keep_saved() -> AbstractContextManager[object]:
    """While compiling: a backward writes into nothing that is saved for it, so that a graph may be
    kept for another one.

    The config `donated_buffer` is read once more at each backward, and then misread.
    """
    return patch.object(graph_compile, "collect_bw_donated_buffer_idxs", lambda *args: [])


def default_store() -> Any:
    """The store that the ranks met at."""
    return dist.distributed_c10d._get_default_store()


def timeout_of(group: dist.ProcessGroup | None) -> timedelta | None:
    """How long a collective of the group waits; None where its backend does not tell."""
    if group is None:
        return None
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if timeout is not None:
            return timeout
    return None


def forget_specs() -> None:
    """DTensor keeps how ops are cut, and in it the mesh, which is equal to one of a new group."""
    clear = getattr(debug, "_clear_sharding_prop_cache", None)
    if clear is not None:
        clear()


def storage_key(x: torch.Tensor) -> int:
    """One number per storage, the same for all views of it; 0 without one."""
    return x.untyped_storage()._cdata if torch._C._has_storage(x) else 0


def assign_data_of_shards(ours: Callable[[object], bool], error: type[Exception]) -> None:
    """`p.data = x` on a DTensor of ours, which torch ignores without a word, sets its shard: x is
    whole, or cut alike, else it is an `error`."""
    if "data" in DTensor.__dict__:
        return
    plain: Any = torch.Tensor.data

    def put(self: DTensor, value: torch.Tensor) -> None:
        if not ours(self):
            plain.__set__(self, value)
            return
        kind = (tuple(value.shape), value.dtype, value.device.type)
        if kind != (tuple(self.shape), self.dtype, self.device.type):
            raise error(
                f".data of a sharded parameter {list(self.shape)} {self.dtype} was set to "
                f"{list(value.shape)} {value.dtype} on {value.device}: use module.to(...) or "
                "assign a new nn.Parameter to the module"
            )
        if not isinstance(value, DTensor):
            value = distribute_tensor(
                value.detach(), self.device_mesh, self.placements, src_data_rank=None
            )
        self._local_tensor.data = value.redistribute(self.device_mesh, self.placements).to_local()

    replace_member(DTensor, "data", property(lambda self: plain.__get__(self), put))


def find_nan_in_shards() -> None:
    """`torch.autograd.set_detect_anomaly` asks every gradient whether any of it is NaN, by an op
    that DTensor does not know: of a shard it is asked of the whole, on all ranks."""
    op = torch.ops.aten._is_any_true.default
    propagator = DTensor._op_dispatcher.sharding_propagator
    if op in propagator.op_strategy_funcs or op in propagator.op_to_rules:
        return
    register_sharding(op)(lambda x: [([Replicate()], [Replicate()])])


def orthogonalise_whole(ours: Callable[[object], bool]) -> None:
    """Muon's iteration for a shard of ours runs on the whole matrix, one at a time, on every rank:
    its sums are in bfloat16, where those of shards would differ from one device's. Idempotent."""
    before = _muon._zeropower_via_newtonschulz
    if before.__module__ == __name__:
        return

    def whole(grad: torch.Tensor, *args: Any) -> torch.Tensor:
        if not (isinstance(grad, DTensor) and ours(grad)):
            return before(grad, *args)
        orthogonal = before(grad.full_tensor(), *args)
        return distribute_tensor(orthogonal, grad.device_mesh, grad.placements, src_data_rank=None)

    _muon._zeropower_via_newtonschulz = whole


def move_shard(p: torch.nn.Parameter, moved: torch.Tensor) -> torch.nn.Parameter:
    """A sharded parameter becomes `moved`, of another type or device. It stays the same object,
    but to and from meta, as in torch; a tied one becomes one new object.

    torch's way with subclasses (`swap_tensors`) refuses what anyone holds a weak reference to.
    """
    if p.is_meta != moved.is_meta:
        new = vars(p).get("_tspc_moved")
        if new is None:
            new = vars(p)["_tspc_moved"] = torch.nn.Parameter(moved, p.requires_grad)
        return new
    assert isinstance(p, DTensor) and isinstance(moved, DTensor)
    plain: Any = torch.Tensor.data
    plain.__set__(p, moved)
    p._local_tensor, p._spec = moved._local_tensor, moved._spec
    return p


def part_of(x: DTensor) -> tuple[list[int], torch.Tensor]:
    """Where this rank's part begins in each dim of the whole, and the part."""
    _, starts = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return list(starts), x._local_tensor


def refuse_pickles(instead: Callable[[DTensor], torch.Tensor]) -> None:
    """`instead(x)` is what is pickled in the place of a DTensor, or it raises. A process still
    sends DTensors to another one of its own (a forking pickler), and copies them."""
    if "__reduce_ex__" in DTensor.__dict__:
        return
    plain = torch.Tensor.__reduce_ex__

    def reduce(self: DTensor, protocol: int) -> object:
        replacement = instead(self)
        return plain(self, protocol) if replacement is self else replacement.__reduce_ex__(protocol)

    replace_member(DTensor, "__reduce_ex__", reduce)
    replace_member(DTensor, "__copy__", lambda x: reconstruct(x, None, *plain(x, 4)))
    ForkingPickler.register(DTensor, lambda x: plain(x, 4))


def cut_loaded_states(cut: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """`Optimizer.load_state_dict` stores `cut(parameter, value)` for each tensor but the steps."""
    plain = Optimizer._process_value_according_to_param_policy
    if plain.__module__ == __name__:
        return

    def policy(
        param: torch.Tensor,
        value: torch.Tensor,
        param_id: int,
        param_groups: list[dict],
        key: object = None,
    ) -> torch.Tensor:
        value = plain(param, value, param_id, param_groups, key)
        return value if key == "step" else cut(param, value)

    replace_member(Optimizer, "_process_value_according_to_param_policy", staticmethod(policy))
