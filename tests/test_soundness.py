"""Rules by brute force: every op of captured models, every factor that its rule leaves cuttable,
run on pieces and rejoined.

The same programs captured with all sizes equal must have the same factor classes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tspc.passes.factorize import Analysis, Record, factorize
from tspc.passes.localize import Sizes, call, constant
from tspc.passes.normalize import normalize
from tspc.passes.regions import find_regions, sequence

from examples.gpt2_like import GPT2Like
from examples.llama_like import LlamaLike
from tspc.capture import Captured, capture_model
from tspc.factor import Factor
from tspc.placement import indices
from tspc.program import CONSTANT, OUTPUT, PLACEHOLDERS, Program, Ref

aten = torch.ops.aten
# run whole on pieces of their positions, or with another count: the compiler has its own way for
# these
SPECIAL = (aten.mean.dim, aten.mean.default, aten.scaled_dot_product_attention.default)


def analysed(model: torch.nn.Module, kwargs: dict[str, Any]) -> tuple[Analysis, dict[str, Any]]:
    """The analysis of a static capture and the value of every placeholder."""
    found: list[tuple[Captured, list[Any]]] = []

    def use(captured: Captured, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append((captured, list(inputs)))
        return gm.forward

    capture_model(model, (), kwargs, use)
    captured, inputs = found[0]
    program = normalize(captured.program)
    given = {n: inputs[i].detach() for n, i in captured.positions.items()}
    return factorize(program), given


def values(program: Program, given: dict[str, Any], a: Analysis) -> dict[tuple[str, int], Any]:
    """Every node's value on one device."""
    env: dict[tuple[str, int], Any] = {}
    plain = Sizes(a.F, {}, {})
    for n in program.nodes:
        if n.op in PLACEHOLDERS:
            env[n.name, 0] = given[n.name]
        elif n.op == CONSTANT:
            env[n.name, 0] = constant(n, torch.device("cpu"))
        elif n.op != OUTPUT:
            out = call(n, [[]], [[]], plain, lambda r: env[r.name, r.item or 0])
            for i, v in enumerate(out if isinstance(out, (list, tuple)) else [out]):
                env[n.name, i] = v
    return env


def take(a: Analysis, x: torch.Tensor, dims: Any, f: Factor, piece: list[int]) -> torch.Tensor:
    for k, d in enumerate(dims):
        if f in a.F.leaves(tuple(d)):
            x = x.index_select(k, torch.tensor(indices(a.F, tuple(d), f, piece)))
    return x


def cuttable(r: Record) -> list[tuple[Factor, str]]:
    """(factor, "keep" | "reduce"): what the rule says may be cut."""
    out = []
    for f in set().union(*r.carried_in, *r.carried_out):
        kinds = {role for role, *_ in r.roles.get(f, ())}
        if not isinstance(f.size, int) or f.size < 2:
            continue
        if not kinds and any(f in c for c in r.carried_out):
            out.append((f, "keep"))
        elif kinds == {"reduce"}:
            out.append((f, "reduce"))
    return out


def run(
    a: Analysis,
    r: Record,
    env: dict[tuple[str, int], Any],
    f: Factor,
    piece: list[int],
    first: bool,
) -> list[Any]:
    """The op on one piece of a factor; what is added after a sum only in the first."""
    sizes = Sizes(a.F, {}, {f: len(piece)})
    dims = {x: d for x, d in zip(r.refs, r.ins) if x is not None}
    linear = r.node.op == aten.linear.default and len(r.node.args) > 2
    once = r.node.args[2] if linear and f not in r.carried_out[0] else None

    def get(x: Ref) -> Any:
        v = take(a, env[x.name, x.item or 0], dims[x], f, piece)
        return torch.zeros_like(v) if x == once and not first else v

    out = call(r.node, r.ins, r.outs, sizes, get)
    return list(out) if isinstance(out, (list, tuple)) else [out]


def check(a: Analysis, env: dict[tuple[str, int], Any]) -> int:
    """Compares every piece; returns how many cuts were tried."""
    done = 0
    for r in a.records:
        if r.node.op in (OUTPUT, *SPECIAL, torch.ops.tspc.pick.default):
            continue
        for f, how in cuttable(r):
            n = int(f.size)
            pieces = [list(range(n // 3 + 1)), list(range(n // 3 + 1, n))]
            parts = [run(a, r, env, f, p, first) for p, first in zip(pieces, (True, False))]
            for i, dims in enumerate(r.outs):
                whole = env[r.node.name, i]
                where = f"{r.node.name} {r.node.op} cut along {f}"
                if how == "reduce":
                    torch.testing.assert_close(parts[0][i] + parts[1][i], whole, msg=where)
                    continue
                for piece, p in zip(pieces, parts):
                    torch.testing.assert_close(p[i], take(a, whole, dims, f, piece), msg=where)
            done += 1
    return done


def library(name: str, h: int, ffn: int, heads: int, kv: int, d: int, v: int) -> torch.nn.Module:
    import transformers as t

    config = {"llama": t.LlamaConfig, "qwen3": t.Qwen3Config}[name](
        vocab_size=v,
        hidden_size=h,
        intermediate_size=ffn,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=d,
    )
    return {"llama": t.LlamaForCausalLM, "qwen3": t.Qwen3ForCausalLM}[name](config)


@pytest.mark.parametrize("name", ["llama_like", "gpt2_like", "llama", "qwen3"])
def test_pieces_rejoin(name: str) -> None:
    torch.manual_seed(0)
    if name == "llama_like":
        model: torch.nn.Module = LlamaLike(23, 24, 1, 4, 2, 10)
    elif name == "gpt2_like":
        model = GPT2Like(23, 24, 1, 4, 16)
    else:
        model = library(name, 24, 10, 4, 2, 6, 23)
    model = model.double()
    tokens = torch.randint(0, 23, (3, 7))
    ids = "tokens" if name.endswith("like") else "input_ids"
    a, given = analysed(model, {ids: tokens, "labels": tokens})
    assert not a.fallbacks
    assert check(a, values(a.program, given, a)) > 60


def signature(a: Analysis) -> list[tuple]:
    """Per value, which dims share a factor with which: the partition, sizes apart."""
    seen: dict[Factor, int] = {}
    out = []
    for r in a.records:
        for side in (*r.ins, *r.outs):
            dims = []
            for d in side or ():
                dims.append(tuple(seen.setdefault(f, len(seen)) for f in a.F.leaves(tuple(d))))
            out.append((r.node.name, tuple(dims)))
    return out


def test_equal_sizes_merge_nothing() -> None:
    tokens = torch.randint(0, 23, (3, 7))
    apart, _ = analysed(library("qwen3", 24, 10, 4, 2, 6, 23), {"input_ids": tokens})
    equal = torch.randint(0, 16, (16, 16))
    same, _ = analysed(library("qwen3", 16, 16, 4, 4, 4, 16), {"input_ids": equal})
    one, two = find_regions(apart), find_regions(same)
    assert len(one.chosen) == len(two.chosen) == 3
    assert [sorted(g.weights) for g in one.chosen] == [sorted(g.weights) for g in two.chosen]
    for a in (apart, same):
        leaf = sequence(a)
        exchanged = {
            r.node.op for r in a.records if any(x[0] == "exchange" for x in r.roles.get(leaf, ()))
        }
        assert exchanged == {aten.scaled_dot_product_attention.default}
    cases = [(a, b) for a, b in zip(signature(apart), signature(same)) if a[0] != b[0]]
    assert not cases
