"""Lower precision: autocast, bf16 models, param_dtype and reduce_dtype on simulated ranks.

With every type of the program widened the result is one device's; as it is, the error against
exact arithmetic stays near one device's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import tspc
from examples.llama_like import LlamaLike
from tests.support.models import MODELS, VOCABULARY, call, loss_of, tokens_of
from tspc.backend import simulated as check
from tspc.backend.simulated import Simulated, relative_errors, simulated_backend
from tspc.base.errors import OptionError
from tspc.base.options import parse
from tspc.frontend.capture import Captured
from tspc.ir.program import Node, Program

pytestmark = pytest.mark.sampled(4)

BF16 = torch.bfloat16
NARROW = (torch.float32, BF16, torch.float16)
Outcome = dict[str, torch.Tensor]


def around(model: nn.Module, dtype: torch.dtype = BF16) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return model(*args, **kwargs)

    return run


class Inside(nn.Module):
    """Autocast in the model's own forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **kwargs: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=BF16):
            return self.model(**kwargs)


class Island(nn.Module):
    """A module that leaves the autocast around it, or takes one of its own."""

    def __init__(self, module: nn.Module, enabled: bool):
        super().__init__()
        self.module, self.enabled = module, enabled

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=BF16, enabled=self.enabled):
            return self.module(x, *rest)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](4, 2, 1)


def outcome(fn: Callable[..., Any], model: nn.Module, kwargs: dict[str, torch.Tensor]) -> Outcome:
    """The loss and all gradients."""
    model.zero_grad()
    loss = loss_of(fn(**kwargs))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def exact(model: nn.Module, kwargs: dict[str, torch.Tensor]) -> Outcome:
    """In float64, without autocast."""
    wide = copy.deepcopy(model).double()
    return outcome(wide, wide, kwargs)


def near(mine: Outcome, one: Outcome, reference: Outcome) -> None:
    """The error is at most 1.5 times one device's, and 2e-3."""
    compare([relative_errors(mine, reference)], [relative_errors(one, reference)])


def compare(of_mine: list[dict[str, float]], of_one: list[dict[str, float]]) -> None:
    """The same of several inputs, by their mean: one small tensor's rounding is a matter of
    luck."""
    mine, one = ({n: sum(e[n] for e in es) / len(es) for n in es[0]} for es in (of_mine, of_one))
    assert not {n: (e, one[n]) for n, e in mine.items() if not e <= 1.5 * one[n] + 2e-3}


def compiled(model: nn.Module, ranks: int = 2, **options: Any) -> tuple[Any, list[Simulated]]:
    made: list[Simulated] = []
    torch._dynamo.reset()
    return torch.compile(model, backend=simulated_backend(ranks, parse(options), made)), made


def widened(program: Program) -> Program:
    def wide(a: Any) -> Any:
        if isinstance(a, (tuple, list)):
            return tuple(map(wide, a))
        return torch.float64 if a in NARROW else a

    def node(n: Node) -> Node:
        types = tuple(replace(t, dtype=wide(t.dtype)) if t else None for t in n.types)
        kwargs = {k: wide(v) for k, v in n.kwargs.items()}
        return replace(n, args=wide(n.args), kwargs=kwargs, types=types)

    return replace(program, nodes=tuple(map(node, program.nodes)))


def widen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every captured program is widened to float64, and what it is given."""
    capture, shards = check.capture, check._shards

    def wide_capture(*args: Any, **kwargs: Any) -> Captured:
        captured = capture(*args, **kwargs)
        return replace(captured, program=widened(captured.program))

    def wide_shards(graph: Simulated, tensors: Any) -> Any:
        given = [t.double() if t.is_floating_point() else t for t in tensors]
        return shards(graph, given)

    monkeypatch.setattr(check, "capture", wide_capture)
    monkeypatch.setattr(check, "_shards", wide_shards)


def narrow_weights(graph: Simulated, dtype: torch.dtype = BF16) -> None:
    """Every fold sends its weights in this type; each float token comes once in a type."""
    assert graph.rewritten.folds and not graph.rewritten.typed.fallbacks
    for body in graph.rewritten.bodies.values():
        assert {body.values[s].dtype for s in body.shards} == {dtype}


def regions(graph: Simulated) -> dict[str, Any]:
    """Region name -> its body."""
    return graph.rewritten.bodies


CASES = [
    ("llama_like", 2, "ring"),
    ("llama_like", 3, "stationary"),
    ("gpt2_like", 2, "auto"),
    ("hf_llama", 2, "broadcast"),
    ("hf_qwen3", 4, "gather"),
]


@pytest.mark.parametrize(("name", "ranks", "schedule"), CASES)
def test_autocast_around_the_call(name: str, ranks: int, schedule: str) -> None:
    model = make(name)
    mine, made = compiled(model, ranks, schedule=schedule)
    errors: list[list[dict[str, float]]] = [[], []]
    for seed in range(4):
        kwargs = call(name, tokens_of(13, seed=seed), True)
        reference = exact(model, kwargs)
        for fn, found in zip((mine, model), errors):
            found.append(relative_errors(outcome(around(fn), model, kwargs), reference))
    compare(*errors)
    assert len(made) == 1
    narrow_weights(made[0])
    assert all(p.dtype == torch.float32 == p.grad.dtype for p in model.parameters())


@pytest.mark.parametrize(("name", "ranks", "schedule"), CASES)
def test_autocast_widened_is_exact(
    name: str, ranks: int, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves are float32, so their gradients end in it; the loss does not."""
    model, kwargs = make(name), call(name, tokens_of(13), True)
    reference = exact(model, kwargs)
    widen(monkeypatch)
    mine, _ = compiled(model, ranks, schedule=schedule)
    got = outcome(around(mine), model, kwargs)
    assert got["loss"].dtype == torch.float64
    errors = relative_errors(got, reference)
    buffers = 1e-6  # cos and sin of float32 frequencies
    assert max(errors.values()) < buffers, errors


@pytest.mark.parametrize("ranks", [2, 3])
def test_autocast_inside_of_forward(ranks: int) -> None:
    model, kwargs = Inside(make("llama_like")), call("llama_like", tokens_of(13), True)
    mine, made = compiled(model, ranks)
    got = outcome(mine, model, kwargs)
    near(got, outcome(model, model, kwargs), renamed(model, kwargs))
    narrow_weights(made[0])


def renamed(model: Inside, kwargs: dict[str, torch.Tensor]) -> Outcome:
    return {f"model.{n}" if n != "loss" else n: x for n, x in exact(model.model, kwargs).items()}


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_of_a_part(enabled: bool) -> None:
    """One region is computed otherwise than the rest."""
    model, kwargs = make("llama_like"), call("llama_like", tokens_of(13), True)
    block = model.blocks[0]  # type: ignore[index]
    block.mlp = Island(block.mlp, enabled)
    run = (lambda f: f) if enabled else around
    mine, made = compiled(model)
    got = outcome(run(mine), model, kwargs)
    wide = copy.deepcopy(model)
    wide.blocks[0].mlp = wide.blocks[0].mlp.module  # type: ignore[index, union-attr]
    reference = {n.replace("mlp.", "mlp.module."): x for n, x in exact(wide, kwargs).items()}
    near(got, outcome(run(model), model, kwargs), reference)
    types = {n: b.values[b.shards[0]].dtype for n, b in regions(made[0]).items()}
    inside, outside = (BF16, torch.float32) if enabled else (torch.float32, BF16)
    assert types["blocks.0.mlp.module"] == inside and types["blocks.0.attention"] == outside


def test_autocast_is_part_of_a_region_key() -> None:
    """Two regions that differ in autocast alone do not share their pieces."""
    model = LlamaLike(VOCABULARY, 32, 2, 4, 2, 50)
    model.blocks[0].mlp = Island(model.blocks[0].mlp, True)
    model.blocks[1].mlp = Island(model.blocks[1].mlp, False)
    mine, made = compiled(model)
    mine(tokens_of(12))
    keys = {n: b.key for n, b in regions(made[0]).items()}
    assert keys["blocks.0.mlp.module"] != keys["blocks.1.mlp.module"]
    assert keys["blocks.0.attention"] == keys["blocks.1.attention"]


class Einsum(nn.Module):
    """Ops that autocast meets only in what they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(*s) / 4) for s in ((16, 24), (24, 16)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(torch.einsum("bsh,hf->bsf", x, self.up))
        return torch.einsum("bsf,fh->bsh", h, self.down).float().square().mean()


def test_autocast_inside_of_an_op() -> None:
    torch.manual_seed(0)
    model, kwargs = Einsum(), {"x": torch.randn(2, 12, 16)}
    mine, _ = compiled(model)
    got = outcome(around(mine), model, kwargs)
    wide = copy.deepcopy(model).double()
    reference = outcome(wide, wide, {"x": kwargs["x"].double()})
    near(got, outcome(around(model), model, kwargs), reference)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("schedule", ["auto", "gather", "stationary"])
def test_a_narrow_model(dtype: torch.dtype, schedule: str) -> None:
    model, kwargs = make("llama_like").to(dtype), call("llama_like", tokens_of(13), True)
    mine, made = compiled(model, 3, schedule=schedule)
    got = outcome(mine, model, kwargs)
    near(got, outcome(model, model, kwargs), exact(model, kwargs))
    narrow_weights(made[0], dtype)


@pytest.mark.parametrize("name", ["llama_like", "gpt2_like", "hf_llama"])
@pytest.mark.parametrize("schedule", ["auto", "gather"])
def test_param_dtype(name: str, schedule: str) -> None:
    """As the model in that type, but the parameters and their gradients stay as they are."""
    model, kwargs = make(name), call(name, tokens_of(13), True)
    mine, made = compiled(model, 2, schedule=schedule, param_dtype=BF16)
    got = outcome(mine, model, kwargs)
    narrow = copy.deepcopy(model).bfloat16()
    near(got, outcome(narrow, narrow, kwargs), exact(model, kwargs))
    narrow_weights(made[0])
    assert all(p.dtype == torch.float32 == p.grad.dtype for p in model.parameters())


@pytest.mark.parametrize("name", ["llama_like", "gpt2_like", "hf_llama"])
def test_param_dtype_widened_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kwargs = make(name), call(name, tokens_of(13), True)
    reference = exact(model, kwargs)
    widen(monkeypatch)
    mine, _ = compiled(model, 3, param_dtype=BF16)
    errors = relative_errors(outcome(mine, model, kwargs), reference)
    assert max(errors.values()) < 1e-6, errors


def sums_sent(made: list[Simulated], run: Callable[[], Any], monkeypatch: Any) -> set[torch.dtype]:
    """The types of what adds up over the ranks on the links of weights."""
    from tspc.runtime.fold import travel

    seen: set[torch.dtype] = set()
    pack = travel.Gradients.pack

    def watch(self: Any, grads: Any) -> torch.Tensor:
        flat = pack(self, grads)
        seen.add(flat.dtype)
        return flat

    monkeypatch.setattr(travel.Gradients, "pack", watch)
    run()
    return seen


@pytest.mark.parametrize(
    ("reduce_dtype", "sent"),
    [(None, torch.float32), (BF16, BF16), (torch.float64, torch.float64)],
)
def test_reduce_dtype(reduce_dtype: Any, sent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kwargs = make("llama_like"), call("llama_like", tokens_of(13), True)
    mine, made = compiled(model, 2, schedule="ring", param_dtype=BF16, reduce_dtype=reduce_dtype)
    assert sums_sent(made, lambda: outcome(mine, model, kwargs), monkeypatch) == {sent}
    got = outcome(mine, model, kwargs)
    narrow = copy.deepcopy(model).bfloat16()
    near(got, outcome(narrow, narrow, kwargs), exact(model, kwargs))


@pytest.mark.parametrize("name", ["param_dtype", "reduce_dtype"])
@pytest.mark.parametrize("value", ["bf16", torch.int64, True])
def test_a_bad_type(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{name}=.*valid: None, torch.bfloat16"):
        parse({name: value})


def test_many_ranks_do_not_drift() -> None:
    """Sums over j and over ranks are in fp32: 8 ranks are as near as one device."""
    model, kwargs = make("hf_llama").bfloat16(), call("hf_llama", tokens_of(40), True)
    reference = exact(model, kwargs)
    one = outcome(model, model, kwargs)
    for schedule in ("auto", "stationary"):
        mine, _ = compiled(model, 8, schedule=schedule)
        near(outcome(mine, model, kwargs), one, reference)


def test_plan_takes_the_types() -> None:
    model, tokens = make("llama_like"), tokens_of(12)
    plan = tspc.plan(model, (tokens, tokens), ranks=2, options={"param_dtype": BF16})
    assert {b.values[s].dtype for b in plan.rewritten.bodies.values() for s in b.shards} == {BF16}


def decorated(fn: Any) -> Any:
    """Mixed precision as accelerate does it: the method of the object, its outputs in float32."""
    inner = torch.autocast("cpu", dtype=BF16)(fn.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        def wide(x: Any) -> Any:
            return x.float() if isinstance(x, torch.Tensor) and x.dtype == BF16 else x

        return torch.utils._pytree.tree_map(wide, inner(*args, **kwargs))

    fn.forward = forward
    return fn


@pytest.mark.parametrize("first", [True, False])
def test_autocast_by_a_decorated_forward(first: bool) -> None:
    """Before and after the model is compiled; a model of a library that makes its logits float32
    in the middle."""
    model, kwargs = make("hf_llama"), call("hf_llama", tokens_of(13), True)
    reference, one = exact(model, kwargs), outcome(decorated(copy.deepcopy(model)), model, kwargs)
    mine, made = compiled(decorated(model) if first else model)
    got = outcome(mine if first else decorated(mine), model, kwargs)
    one = outcome(model if first else decorated(model), model, kwargs)
    near(got, one, reference)
    assert len(made) == 1
    narrow_weights(made[0])


class Upcast(nn.Module):
    """A cast to float32 is one inside of autocast, and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=BF16):
            y = self.narrow(torch.relu(self.wide(x)))
            inside = y.float() + 1e-3
        return y, inside, y.float() * 1.001


def test_a_cast_of_what_autocast_made_is_kept() -> None:
    torch.manual_seed(0)
    model, x = Upcast(), torch.randn(2, 12, 16)
    with torch.no_grad():
        mine, one = compiled(model)[0](x), model(x)
    assert [t.dtype for t in mine] == [t.dtype for t in one]
    for a, b in zip(mine[1:], one[1:]):
        assert (a.to(BF16) != a).any()  # more than a half can hold
        assert float((a - b).abs().max()) <= 2**-7 * float(b.abs().max())
