"""Compile one rank's program: AOTAutograd, then Inductor with the order of communications kept,
or plain eager graphs.

The program is traced first, so that AOTAutograd's cache knows it: a second start lowers nothing.
The graph holds no rank: one rank's cache serves all.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx, maybe_enable_thunkify
from torch.fx.traceback import preserve_node_meta

from tspc.ops.counter import mix, mixed
from tspc.runtime.lowering.trace import Fakes, Program, tag
from tspc.seams.compiler import keep_saved, outside_of_dynamo
from tspc.seams.lowering import (
    AOTDispatchCompiler,
    CustomGraphPass,
    FxGraphCache,
    OutputCode,
    SerializableAOTDispatchCompiler,
    TracingContext,
    V,
    aot_module_simplified,
    compile_fx_inner,
    functorch_config,
    inductor_config,
    make_boxed_func,
    make_pointwise,
    min_cut_rematerialization_partition,
    preserve_node_ordering,
    register_lowering,
    select_decomp_table,
    tracing,
)
from tspc.seams.lowering import inductor_ops as ops
from tspc.seams.tensors import DisableAutocast, OrderedSet

Boxed = Callable[[list[object]], object]  # of the list of its arguments


class _Operators:
    """Python's operators on what Inductor traces."""

    xor, rshift, mul, and_ = (
        ops.bitwise_xor,
        ops.bitwise_right_shift,
        ops.mul,
        ops.bitwise_and,
    )


@register_lowering(mix, type_promotion_kind=None)
def _lower_mix(x: Any) -> Any:
    """One expression, in which each word is computed once."""

    def word(value: int) -> Any:
        return ops.constant(value, torch.int64)

    return make_pointwise(lambda x: mixed(x, _Operators, word))(x)


class KeepOrder(CustomGraphPass):
    """Chain tspc's ops in the order of the graph; Inductor would reorder independent ones by size
    hints."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        previous: torch.fx.Node | None = None
        chain = {}
        for n in graph.nodes:
            if getattr(n.target, "namespace", "") != "tspc":
                continue
            if previous is not None and previous not in n.all_input_nodes:
                chain[n] = OrderedSet([previous])
            previous = n
        preserve_node_ordering(graph, chain)

    def uuid(self) -> str:
        return "tspc-keep-order-1"


def _partition(
    joint: torch.fx.GraphModule, inputs: object, **kwargs: Any
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Min-cut."""
    tag(joint)
    return min_cut_rematerialization_partition(joint, inputs, **kwargs)


@dataclass
class Lowered(OutputCode):
    """What Inductor made of a graph, as AOTAutograd's cache takes it.

    The casts are in the program; a caller's autocast must not cast again.
    """

    graph: Any
    _boxed_call: bool = True

    def __call__(self, inputs: Sequence[object]) -> object:
        with DisableAutocast():
            return self.graph(inputs)

    def prepare_for_serialization(self) -> None:
        self.graph = copy.copy(self.graph)
        self.graph.prepare_for_serialization()

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        """Called when it was loaded."""
        loaded, _ = FxGraphCache.cache_hit_post_compile(self.graph, {}, constants)
        if loaded is None:
            raise RuntimeError("a compiled graph cannot be loaded again")
        self.graph = loaded
        self.graph.post_compile(example_inputs, constants, graph_kwargs)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        self.graph.set_triton_bundle(triton_bundle)


def _inner(fakes: Fakes, is_backward: bool) -> AOTDispatchCompiler:
    def compile_graph(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        out = next(n for n in gm.graph.nodes if n.op == "output")
        out.meta["user_visible_output_idxs"] = list(range(len(out.args[0])))
        with V.set_fake_mode(fakes.mode):
            lowered = Lowered(compile_fx_inner(gm, inputs, is_backward=is_backward))
        # a backward inside of a compiled function
        return torch.compiler.disable(lowered) if is_backward else lowered

    return SerializableAOTDispatchCompiler(OutputCode, compile_graph)


def _eager(gm: torch.fx.GraphModule, example_inputs: Sequence[object]) -> object:
    return _without_autocast(make_boxed_func(gm.forward))


def _without_autocast(compiled: Boxed) -> Boxed:
    """The casts are in the program; a caller's autocast must not cast again."""

    def run(args: list[object]) -> object:
        with DisableAutocast():
            return compiled(args)

    whole = outside_of_dynamo(run)  # a backward inside of a compiled function
    whole._boxed_call = True  # type: ignore[attr-defined]
    return whole


def _traced(program: torch.nn.Module, fakes: Fakes) -> torch.fx.GraphModule:
    """The forward above autograd. What a cache's key of a graph leaves out is told in `tspc_key`:
    what is recomputed, the constants' values, and the code that made all this."""

    def run(*args: object) -> object:
        with maybe_enable_thunkify():  # sizes that no op takes are no nodes
            return program(*args)

    with fakes.mode, torch.enable_grad(), preserve_node_meta():
        gm = make_fx(run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(
            *fakes.inputs
        )
    metas = [[str(n.meta.get(k)) for k in ("recompute", "ac_graph_id")] for n in gm.graph.nodes]
    held = [n.target for n in gm.graph.find_nodes(op="get_attr")]
    values = [getattr(gm, str(t)).tolist() for t in held]
    text = repr((_own_code(), metas, values))
    vars(gm)["tspc_key"] = hashlib.sha256(text.encode()).hexdigest()
    return gm


@lru_cache(maxsize=1)
def _own_code() -> str:
    return hash_of_code(Path(str(importlib.import_module("tspc").__file__)).parent)


def hash_of_code(folder: Path) -> str:
    """Of all Python files of a package and its sub-packages, and where they are."""
    digest = hashlib.sha256()
    for at, _, names in sorted(os.walk(folder, followlinks=True)):  # passes and runtime are links
        for file in (Path(at, n) for n in sorted(names) if n.endswith(".py")):
            digest.update(f"{file.relative_to(folder)}:".encode() + file.read_bytes())
    return digest.hexdigest()


def compile_local(program: torch.nn.Module, fakes: Fakes, compiler: str) -> Program:
    """-> a function of (symbols, rows, placeholders) with autograd; forward and backward are
    compiled now."""
    inductor = compiler == "inductor"
    forward = _inner(fakes, False) if inductor else _eager
    backward = _inner(fakes, True) if inductor else _eager
    graph: Any = _traced(program, fakes) if inductor else program
    patches = {"force_non_lazy_backward_lowering": True, "bundled_autograd_cache": inductor}
    with (
        tracing(TracingContext(fakes.mode)),
        functorch_config.patch(patches),
        keep_saved(),
        inductor_config.patch(post_grad_custom_post_pass=KeepOrder()),
    ):
        return aot_module_simplified(
            graph,
            tuple(fakes.inputs),
            fw_compiler=forward,
            bw_compiler=backward,
            inference_compiler=forward,
            partition_fn=_partition,
            decompositions=select_decomp_table() if inductor else None,
        )
