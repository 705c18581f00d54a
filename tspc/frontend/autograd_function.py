"""An `autograd.Function` in a Dynamo graph becomes plain ops whose derivative is its backward.

In: a graph module, changed in place. Its forward is traced as it is. Its backward is a linear
function b of the cotangents; bᵀ, which autograd makes of b, is traced on the arguments, and
`tspc::graft` gives the forward's value and sends its cotangent g to bᵀ: so it arrives as b(g). What
bᵀ would be worth is never computed. A backward that is not linear is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Sequence

import torch
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Argument, Node
from torch.fx.traceback import preserve_node_meta

from tspc.base.context import Context
from tspc.base.errors import UnsupportedError
from tspc.frontend.vmap import copied, like
from tspc.ir.source import source_line
from tspc.ops.library import LIB
from tspc.seams.tensors import FakeTensor, FakeTensorMode, OpOverload

Tensor = torch.Tensor
APPLY = torch.ops.higher_order.autograd_function_apply
# what is zero where: every operand is, one is, the first is
EVERY = {"cat", "stack", "complex", "index_put", "scatter_add", "index_add", "slice_scatter"}
ANY = {"mul", "mm", "bmm", "matmul", "dot", "mv", "linear", "einsum"}
FIRST = {
    *("neg", "div", "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t"),
    *("squeeze", "unsqueeze", "slice", "select", "index", "gather", "index_select", "split"),
    *("split_with_sizes", "sum", "mean", "_to_copy", "clone", "alias", "detach", "cumsum"),
    *("flip", "roll", "lift_fresh_copy", "abs", "unfold", "as_strided", "convolution_backward"),
    *("embedding_dense_backward", "native_layer_norm_backward", "_softmax_backward_data"),
    *("_log_softmax_backward_data", "gelu_backward", "silu_backward", "threshold_backward"),
    *("sigmoid_backward", "tanh_backward", "view_as_real", "view_as_complex", "real", "imag"),
    *("_conj", "_conj_physical", "conj_physical", "resolve_conj"),
}
ALWAYS = {"zeros", "zeros_like", "new_zeros"}


class _Graft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, value: Tensor, gradient: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Context, *gs: Tensor) -> tuple[None, Tensor]:
        return None, gs[0]


def _graft(value: Tensor, gradient: Tensor) -> Tensor:
    return _Graft.apply(value, gradient)


LIB.define("graft(Tensor value, Tensor gradient) -> Tensor", tags=(torch.Tag.pointwise,))
LIB.impl("graft", _graft, "CompositeImplicitAutograd")


def inlined(gm: torch.fx.GraphModule, inputs: Sequence[object], mode: FakeTensorMode) -> None:
    """inputs, mode: as in `vmap.inlined`. Raises `UnsupportedError` for a backward that is not
    linear in the cotangents."""
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs))
    for n in gm.graph.find_nodes(op="call_function", target=APPLY):
        _replace(gm, n, values, mode)
    gm.graph.lint()
    gm.recompile()


def _refuse(n: Node, why: str) -> UnsupportedError:
    where = source_line(n) or n.name
    return UnsupportedError(
        f"{where}: the backward of an autograd.Function {why}; write it with ops of torch, or take "
        "it out of the compiled model"
    )


def _replace(
    gm: torch.fx.GraphModule, n: Node, values: dict[Node, object], mode: FakeTensorMode
) -> None:
    forward, backward = (_graph(gm, a) for a in n.args[:2])
    if "saved_for_backward_idx" not in n.kwargs:
        raise _refuse(n, "is read with torch 2.13 only")
    if n.kwargs.get("dirty_idx"):
        raise _refuse(n, "is of a forward that writes into its arguments")
    operands = n.args[2:]
    constants = [
        values.get(a, a.meta.get("example_value")) if isinstance(a, Node) else a for a in operands
    ]
    wants = torch.is_grad_enabled() and any(
        x.requires_grad for x in constants if isinstance(x, Tensor)
    )
    fakes, again = ([like(x, mode) for x in constants] for _ in range(2))
    with mode, preserve_node_meta():
        with torch.no_grad():
            outs, saved = torch.fx.Interpreter(forward).run(*fakes)
        gs = [like(x, mode) for x in outs]
        linear = _traced(functionalize(_called(backward)), gs, saved) if wants else None
    if linear is not None:
        _check_linear(n, linear, len(gs))
    unseen = n.kwargs["non_differentiable_idx"]
    assert isinstance(unseen, (tuple, list))
    run = _with_transposed(forward, linear, unseen)
    with mode, preserve_node_meta():
        traced = _traced(run, fakes, again, gs)
    traced.graph.eliminate_dead_code()
    if any(h.users for h in traced.graph.find_nodes(op="placeholder")[-len(gs) :]):
        raise _refuse(n, "is not linear in the cotangents")
    with gm.graph.inserting_before(n):
        apart = [_detached(gm, a) for a in operands]
        flat = copied(gm, traced, [*apart, *operands, *[None] * len(gs)])
        copies = [
            x if z is None else gm.graph.call_function(torch.ops.tspc.graft.default, (x, z))
            for x, z in zip(flat[: len(gs)], flat[len(gs) :])
        ]
    for user in list(n.users):
        assert user.target is operator.getitem and isinstance(user.args[1], int)
        new = copies[user.args[1]]
        assert isinstance(new, Node)
        new.meta.setdefault("example_value", user.meta.get("example_value"))
        new.meta.setdefault("stack_trace", n.meta.get("stack_trace"))
        user.replace_all_uses_with(new)
        gm.graph.erase_node(user)
    gm.graph.erase_node(n)


def _graph(gm: torch.fx.GraphModule, a: Argument) -> torch.fx.GraphModule:
    assert isinstance(a, Node)
    graph = gm.get_submodule(str(a.target))
    assert isinstance(graph, torch.fx.GraphModule)
    return graph


def _traced(fn: Callable[..., object], *args: object) -> torch.fx.GraphModule:
    return make_fx(fn, tracing_mode="real", _allow_non_fake_inputs=True)(*args)


def _called(
    backward: torch.fx.GraphModule,
) -> Callable[[Sequence[object], Sequence[object]], object]:
    return lambda gs, saved: torch.fx.Interpreter(backward).run(*gs, *saved)


def _with_transposed(
    forward: torch.fx.GraphModule, linear: torch.fx.GraphModule | None, unseen: Container[int]
) -> Callable[[list[object], list[object], list[Tensor]], object]:
    """(arguments, the same again, cotangents) -> the results of the first, bᵀ of the second.

    The cotangents only give bᵀ its place in the trace. unseen: the results that have none.
    """

    def run(args: list[object], again: list[object], cotangents: list[Tensor]) -> object:
        with torch.no_grad():
            outs, saved = torch.fx.Interpreter(forward).run(*args)
        derived: list[Tensor | None] = [None] * len(outs)
        if linear is None:
            return outs, derived
        with torch.enable_grad():
            gs = [
                g.detach().requires_grad_(_is_number(g)) if isinstance(g, Tensor) else g
                for g in cotangents
            ]
            seen = [i for i, g in enumerate(gs) if i not in unseen and isinstance(g, Tensor)]
            seen = [i for i in seen if gs[i].requires_grad]
            pairs = [
                (b, v.to(b.dtype))
                for b, v in zip(linear(gs, saved), again)
                if isinstance(b, Tensor) and isinstance(v, Tensor) and b.requires_grad
            ]
            if pairs:
                bs, vs = zip(*pairs)
                transposed = torch.autograd.grad(bs, [gs[i] for i in seen], vs, allow_unused=True)
                for i, z in zip(seen, transposed):
                    derived[i] = z
        return outs, derived

    return run


def _detached(gm: torch.fx.GraphModule, a: Argument) -> Argument:
    if not isinstance(a, Node) or not isinstance(a.meta.get("example_value"), Tensor):
        return a
    return gm.graph.call_function(torch.ops.aten.detach.default, (a,))


def _check_linear(n: Node, traced: torch.fx.GraphModule, cotangents: int) -> None:
    """Nothing arrives where no cotangent does."""
    zero: set[Node] = set(traced.graph.find_nodes(op="placeholder")[:cotangents])
    for m in traced.graph.nodes:
        if m.op == "get_attr":
            value = getattr(traced, str(m.target))
            value = value.constant if isinstance(value, FakeTensor) else value
            if value is not None and not value.any():
                zero.add(m)
        elif m.op == "call_function" and _is_zero(m, zero):
            zero.add(m)
    (out,) = traced.graph.find_nodes(op="output")
    if any(_holds_numbers(x) and x not in zero for x in out.args[0]):
        raise _refuse(n, "adds to what the cotangents make, or uses an op that is not known here")


def _holds_numbers(x: object) -> bool:
    value = x.meta.get("val") if isinstance(x, Node) else None
    held = isinstance(x, Node) and x.op == "get_attr"
    return held or (isinstance(value, Tensor) and _is_number(value))


def _is_number(x: Tensor) -> bool:
    """It can have a gradient."""
    return x.is_floating_point() or x.is_complex()


def _is_zero(m: Node, zero: set[Node]) -> bool:
    if m.target is operator.getitem:
        return m.args[0] in zero
    assert isinstance(m.target, OpOverload)
    name = m.target._schema.name.split("::")[1]
    zeros = [x in zero for x in m.all_input_nodes if _holds_numbers(x)]
    if name in ("add", "sub", "where"):
        numbers = [x for x in m.args if not isinstance(x, Node)]
        return all(zeros) and not any(numbers)
    if name in ("full", "scalar_tensor"):
        return bool(m.args[-1] == 0)
    return (
        name in ALWAYS
        or (name in EVERY and all(zeros))
        or (name in ANY and any(zeros))
        or (name in FIRST and zeros[:1] == [True])
        or (name == "masked_fill" and zeros[:1] == [True] and bool(m.args[2] == 0))
    )
