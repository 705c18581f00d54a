"""What is measured of one model of the zoo: parity, folds, what is gathered or replicated,
compiles, memory per rank. Everything comes back as plain data for JSON."""

from __future__ import annotations

import fnmatch
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch._guards import CompileContext

import tspc
from examples.measure import peak_of, state_bytes
from tests.support.models import whole
from tests.support.widen import Widen
from tests.support.world import World
from tests.support.zoo import build, sized
from tspc.backend.simulated import Simulated, relative_errors, simulated_backend
from tspc.explain.report import reports
from tspc.ir.body import evaluate
from tspc.ir.kinds import WHOLE
from tspc.ir.program import PARAM
from tspc.ops.attention import ATTENTION
from tspc.passes.analyse.regions import VIEWS, weight_values
from tspc.passes.lower.unit import Unit

aten = torch.ops.aten
CASES = ((2, 24), (3, 24), (4, 24), (4, 23))  # ranks, length
LENGTHS = (24, 23, 17, 40, 9)
BATCHES = (2, 3, 5, 4, 7)  # of a model whose length is in its parameters
EXACT = 1e-9
SHARES = {"state": 0.30, "alive": 0.375}
CONTRACTED = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "_grouped_mm"}
PARTS = {"index", "index_select", "select", "slice", "split", "unbind", "split_with_sizes"} | VIEWS
# a later step of the project folds the experts of a mixture; their router is small
EXPERTS = ("*.experts.*", "*.mlp.gate.weight", "*.mlp.router.weight")
# one matrix between a norm and a norm or a table: it has no inner factor that a fold could cut
ALONE = (
    "cls.predictions.transform.dense.weight",
    "head.dense.weight",
    "predictions.dense.weight",
    "*.embedding_hidden_mapping_in.weight",
    "*.kv_a_proj_with_mqa.weight",
)
Facts = dict[str, Any]


def attempt(fn: Callable[[], Facts]) -> Facts:
    """What fn finds, or the error that stopped it; with its seconds."""
    start = time.perf_counter()
    try:
        found = fn()
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        line = " ".join(str(e).split())
        file = at.filename.split("site-packages/")[-1].rsplit("/", 2)[-2:]
        found = {"error": f"{type(e).__name__}: {line[:300]} ({'/'.join(file)}:{at.lineno})"}
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def parity(name: str, ranks: int, length: int) -> Facts:
    """The worst relative error of outputs and gradients in lockstep, in float64."""
    model, kwargs = build(name, length)
    with Widen():
        found = tspc.verify(model, (), kwargs, ranks, tolerance=float("inf"))
    return {"worst": found.worst, "graphs": len(found.graphs)}


def decided(name: str, ranks: int = 4) -> Facts:
    """What the graphs of the model as it is trained fold, gather and run replicated."""
    torch._dynamo.reset()
    model, kwargs = narrow(name, LENGTHS[0])
    made: list[Simulated] = []
    torch.compile(model, backend=simulated_backend(ranks, None, made))(**kwargs)
    seen = [structure(g.rewritten) for g in made]
    return {k: [x for s in seen for x in s[k]] for k in seen[0]}


def structure(rewritten: Unit) -> dict[str, list[Any]]:
    """What a graph folds, gathers and runs replicated."""
    choice = rewritten.choice
    folded = [n for f in rewritten.folds for n in f.kwargs["fold"].body if n.op == ATTENTION]
    outside = [n.source for n in rewritten.typed.program.nodes if n.op == ATTENTION]
    return {
        "folds": [name for name, _, _ in choice.regions],
        "refused": [[", ".join(sorted(g.weights)), why] for g, why in choice.refused],
        "attentions": ["folded"] * len(folded) + outside,
        "unfolded": unfolded(rewritten),
        "gathered": gathered(rewritten),
        "replicated": [str(r) for r in reports(rewritten)],
    }


def unfolded(rewritten: Unit) -> list[str]:
    """Weights that are multiplied with activations outside of folds."""
    a, storages = rewritten.analysis, rewritten.choice.storages
    of, found = weight_values(a), set()
    for r in a.records:
        for x in r.refs if r.node.is_call else ():
            if x is not None and r.node.op._schema.name.split("::")[1] in CONTRACTED:
                found.add(of.get(x.name) or _indexed(a, x.name, of))
    shapes = {n.name: n.type.shape for n in a.program.nodes if n.op == PARAM}
    return [n for n, s in storages.items() if n in found and s.kind != "fold" and shapes[n][1:]]


def _indexed(a: Any, name: str, of: dict[str, str]) -> str | None:
    """The parameter that rows or ranges were taken of."""
    made = {r.node.name: r for r in a.records}
    while name in made and name not in of:
        x = made[name].refs[0]
        if x is None or made[name].node.op._schema.name.split("::")[1] not in PARTS:
            return None
        name = x.name
    return of.get(name)


def gathered(rewritten: Unit) -> list[list[Any]]:
    """(what, bytes, where) of each float that is gathered along the sequence, but K, V and
    scalars."""
    typed, hints, out = rewritten.typed, rewritten.analysis.program.hints, []

    def size(shape: Any, dtype: torch.dtype) -> int:
        n = dtype.itemsize
        for s in shape:
            n *= int(evaluate(s, hints))
        return n

    for n in typed.program.nodes:
        if n.op == WHOLE and n.type.is_float and n.type.shape:
            out.append([n.args[0].name, size(n.type.shape, n.type.dtype), n.source])
    for i, (r, a) in enumerate(zip(rewritten.results, typed.program.output.args)):
        cut = r is not None and r.kind == "whole" and typed.places[a.name, a.item or 0] == "S"
        if cut and r.dtype.is_floating_point:
            made = typed.program.node(a.name)
            out.append([f"output {i}", size(r.shape, r.dtype), made.source])
    return out


def folds_all(facts: Facts) -> bool:
    """Every attention, MLP and vocabulary region is folded; of mixtures all but the experts."""
    rest = [
        n for n in facts["unfolded"] if not any(fnmatch.fnmatch(n, p) for p in (*EXPERTS, *ALONE))
    ]
    return set(facts["attentions"]) <= {"folded"} and bool(facts["folds"]) and not rest


def inputs(name: str, i: int) -> Facts:
    """The i-th of calls of unlike lengths; where the model has one length, of unlike batches."""
    if name == "vit":
        return narrow(name, LENGTHS[0], BATCHES[i])[1]
    _, given = narrow(name, LENGTHS[i])
    if name == "whisper":  # the encoder has one length
        given["input_features"] = narrow(name, LENGTHS[0])[1]["input_features"]
    return given


def outcome(fn: Any, model: torch.nn.Module, kwargs: Facts) -> dict[str, torch.Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    loss = loss_of(fn(**kwargs))
    loss.backward()
    grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return grads | {"loss": loss.detach()}


def loss_of(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0] if type(out) is tuple else out.loss


def compiles(name: str, dynamic: bool | None, ranks: int = 2) -> Facts:
    """How often each graph is compiled over five lengths, and the worst error of a call."""
    torch._dynamo.reset()
    model, _ = narrow(name, LENGTHS[0])
    simulated, frames = simulated_backend(ranks), Counter[str]()

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        made = CompileContext.current_compile_id()
        assert made is not None
        frames[str(made.frame_id)] += 1
        return simulated(gm, example_inputs)

    fn, errors = torch.compile(model, backend=backend, dynamic=dynamic), []
    for i in range(len(LENGTHS)):
        kwargs = inputs(name, i)
        mine, one = (outcome(f, model, kwargs) for f in (fn, model))
        errors.append(max(relative_errors(mine, one).values()))
    return {"compiles": list(frames.values()), "worst": max(errors)}


def narrow(name: str, length: int, batch: int = 2) -> tuple[torch.nn.Module, Facts]:
    """The model and its call in float32, experts as the library runs them by default."""
    model, kwargs = build(name, length, batch)
    model = model.float()
    for m in model.modules():
        for k, x in m._buffers.items():
            if x is not None and x.is_complex():
                m._buffers[k] = x.to(torch.complex64)
    floats = {n: x for n, x in kwargs.items() if isinstance(x, torch.Tensor)}
    return model, kwargs | {n: x.float() for n, x in floats.items() if x.is_floating_point()}


def held(name: str, tsp: bool, length: int) -> tuple[int, int, float]:
    """(bytes of parameters, gradients and Adam state; bytes alive after forward; loss)."""
    with sized("measured"):
        model, kwargs = narrow(name, length)
        fn = torch.compile(model, backend="tsp") if tsp else torch.compile(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loss_of(fn(**kwargs)).backward()
        optimizer.step()
        state = sum(state_bytes(model, optimizer).values())
        optimizer.zero_grad()
        _, alive, out = peak_of(lambda: fn(**kwargs))
        return state, alive, float(loss_of(out).detach())


def differs(name: str, length: int) -> float:
    """The worst relative error of the first loss and its gradients in float32."""
    model, kwargs = narrow(name, length)
    one = outcome(model, model, kwargs)
    mine = outcome(torch.compile(model, backend="tsp"), model, kwargs)
    return max(relative_errors(mine, one).values())


class Worlds:
    """Real processes, made at first use; those that failed are made again."""

    def __init__(self) -> None:
        self.made: dict[int, World] = {}

    def run(self, ranks: int, function: Any, **kwargs: Any) -> list[Any]:
        if ranks not in self.made:
            self.made[ranks] = World(ranks)
        try:
            return self.made[ranks].run(function, **kwargs)
        except Exception:
            for p in self.made.pop(ranks).processes:
                p.kill()
            raise

    def close(self) -> None:
        for w in self.made.values():
            w.close()


def memory(name: str, worlds: Worlds, ranks: int = 4, length: int = 512) -> Facts:
    """A rank's share of one device's bytes: the greatest of all ranks."""
    ((state, alive, loss),) = worlds.run(1, held, name=name, tsp=False, length=length)
    mine = worlds.run(ranks, held, name=name, tsp=True, length=length)
    return {
        "state": max(s for s, _, _ in mine) / state,
        "alive": max(a for _, a, _ in mine) / alive,
        "loss error": max(abs(l - loss) for _, _, l in mine) / abs(loss),
    }


def gloo(name: str, worlds: Worlds) -> Facts:
    return {"worst": max(worlds.run(2, differs, name=name, length=LENGTHS[0]))}


def short(weight: str) -> str:
    """A weight's name for all layers."""
    return re.sub(r"\.\d+\.", ".*.", weight)
