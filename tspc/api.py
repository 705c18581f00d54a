"""The front door beside `torch.compile`: plan before running, explain what was compiled, verify
against one device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tspc.backend.dry import DryRun, dry_run
from tspc.backend.planned import check_planned, parameters_of
from tspc.backend.tsp import GRAPHS, Compiled
from tspc.base.errors import CaptureError, PlanError, TspcError
from tspc.base.hardware import device_name
from tspc.base.options import Options, parse
from tspc.base.usage import (
    check_called,
    check_device,
    check_function,
    check_mesh,
    check_module,
    check_name,
    check_parameters,
    check_ranks,
    said,
)
from tspc.cost.budget import lines
from tspc.explain import attention as attended
from tspc.explain.origin import origin
from tspc.explain.report import reports
from tspc.explain.show import show
from tspc.frontend.capture import capture
from tspc.passes.lower.unit import Unit
from tspc.runtime.comm.place import Place
from tspc.runtime.comm.requests import Axis
from tspc.runtime.fold.schedules import choose
from tspc.runtime.mesh import resolve
from tspc.runtime.params.convert import convert
from tspc.runtime.params.initialise import initialise
from tspc.seams.compiler import plainly
from tspc.seams.dynamo import isolated
from tspc.seams.tensors import FakeTensorMode, tree_leaves, tree_map


@dataclass(frozen=True)
class Plan:
    """What tspc will do with a model on `ranks` ranks: print it before you run.

    ranks: of the TSP axis. The text has a line for each sequence, for what is kept for the backward
    (bytes a rank) and what runs replicated, then one a value of the rewritten program: shape
    ("@tsp": cut over the ranks, "+tsp": partial sums, "~tsp": equal, with a partial gradient), op,
    the model's file and line.
    """

    ranks: int
    rewritten: Unit = field(repr=False)
    sizes: dict[sympy.Symbol, int] = field(repr=False)
    options: Options = field(default=Options(), repr=False)
    parameters: dict[str, str] = field(default_factory=dict, repr=False)  # of the model planned

    def __str__(self) -> str:
        return _text(self.rewritten, self.ranks, self.sizes)

    def origin(self, name: str) -> str:
        """Why a region, parameter or value of the printed plan is as it is, one decision a line.

        name: as printed. Raises `PlanError` for one that is not in the plan.
        """
        check_name("plan.origin(...)", name)
        return origin(self.rewritten, name, self.sizes)

    def dims(self) -> dict[str, int | None]:
        """Parameter name -> the dim that is cut, None where it is replicated."""
        return {n: s.map.dim if s.map else None for n, s in self.rewritten.choice.storages.items()}

    def apply(self, model: nn.Module, mesh: DeviceMesh | None = None) -> None:
        """Shard the parameters in place as DTensors, by rank 0's values; live optimizers are
        rebound. Collective.

        mesh: default the one of the options, else the world. On meta nothing is sent: the
        parameters become shards on meta, for `model.to_empty` and then `init` or a checkpoint.
        Raises `PlanError` if the axis has another number of ranks than the plan, or the model other
        parameters.
        """
        where = "plan.apply(...)"
        check_module(where, model)
        check_mesh(where, mesh)
        check_parameters(where, model)
        check_planned(where, self.parameters, model)
        parameters = dict(model.named_parameters())
        device = next(iter(parameters.values())).device
        options = replace(self.options, mesh=mesh or self.options.mesh)
        place, storage = resolve(options, device, planned=True)
        if place.axis.size != self.ranks:
            raise PlanError(f"the plan is for {self.ranks} ranks, the axis has {place.axis.size}")
        dims = {id(parameters[n]): d for n, d in self.dims().items() if n in parameters}
        if storage is not None and (self.ranks > 1 or place.replicas is not None):
            convert(model, storage, place.axis.name, dims, self.options.cut)

    def dry_run(
        self,
        device: str = "cuda",
        optimizer: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]
        | None = torch.optim.AdamW,
    ) -> DryRun:
        """Run one rank of a training step without values: memory, traffic, FLOPs, the kernels of
        attention, and what the host waits for. Nothing is computed or sent, no group is needed.

        device: its kind, of which there need be none here; then a C++ compiler makes torch a guard.
        optimizer: makes one of the parameters, None for no step. -> a `DryRun`, of the sizes that
        were planned. Raises `OptionError` for a bad argument.
        """
        where = "plan.dry_run(...)"
        check_device(where, device)
        if optimizer is not None:
            check_function(where, "optimizer", optimizer)
        return dry_run(self.rewritten, self.sizes, device, optimizer)

    def init(
        self,
        model: nn.Module,
        build: Callable[[], nn.Module] | None = None,
        init_fn: Callable[[nn.Module], object] | None = None,
    ) -> None:
        """Give the parameters and buffers of an applied model the values of one device's under
        the same `torch.manual_seed` (rank 0's), bit for bit. Collective.

        build: the constructor, run again with one whole parameter at a time in memory; what a
        Hugging Face model does by default, from its config. init_fn(model): initialises in place.
        Default otherwise: `model.init_weights()`, or `reset_parameters()` of each module in order.
        Raises `PlanError` for a model that is not sharded and for a parameter or buffer that
        nothing initialises, by name.
        """
        where = "plan.init(...)"
        check_module(where, model)
        check_function(where, "build", build)
        check_function(where, "init_fn", init_fn)
        sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
        if self.ranks > 1 and not sharded:
            raise PlanError("the model is not sharded: plan.apply(model, mesh) first")
        place = Place(Axis("tsp", 1, 0))
        if sharded:
            mesh = sharded[0].device_mesh
            device = torch.device(mesh.device_type)
            place, _ = resolve(replace(self.options, mesh=mesh), device)
        initialise(model, place, build, init_fn)


def _device(inputs: Sequence[object], mesh: DeviceMesh | None) -> torch.device:
    """Where the plan would run."""
    if mesh is not None:
        return torch.device(mesh.device_type)
    return next((x.device for x in inputs if isinstance(x, torch.Tensor)), torch.device("cpu"))


class _Stop(Exception):
    pass


def plan(
    model: Callable[..., object],
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    ranks: int | None = None,
    mesh: DeviceMesh | None = None,
    options: Mapping[str, object] | None = None,
) -> Plan:
    """Trace the model on these inputs and decide; nothing runs, so meta tensors will do. No process
    group is needed.

    model: a module or a function. args, kwargs: of one call, whole (not this rank's part). ranks:
    of the TSP axis, or mesh: the `DeviceMesh` that has it. options: as in
    `torch.compile(options=...)`. -> the `Plan` of the first graph. Raises `PlanError` without
    `ranks` or `mesh`, `CaptureError` if the model does not trace, `OptionError` for a bad argument
    or option, `UnsupportedError` for what would be wrong, with the model's file and line.
    """
    where = "plan(...)"
    check_called(where, model, args, kwargs)
    check_mesh(where, mesh)
    chosen = parse(options)
    mesh = chosen.mesh if mesh is None else mesh
    if mesh is not None:
        size = resolve(replace(chosen, mesh=mesh), torch.device(mesh.device_type))[0].axis.size
        if ranks not in (None, size):
            raise PlanError(
                f"plan(...): ranks={said(ranks)} beside a mesh whose axis has {size} ranks: give "
                "one of them"
            )
        ranks = size
    if ranks is None:
        raise PlanError("plan(...) needs ranks= or mesh=")
    check_ranks(where, ranks)
    count, plans, device = ranks, [], _device(tree_leaves((args, kwargs)), mesh)
    named = parameters_of(model) if isinstance(model, nn.Module) else {}

    @plainly(TspcError)
    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[object]) -> object:
        captured = capture(gm, example_inputs, param_dtype=chosen.param_dtype)
        rewritten = captured.rewritten(count, "tsp", chosen, device_name(device))
        plans.append(Plan(count, rewritten, dict(captured.program.hints), chosen, named))
        raise _Stop

    inputs = (tuple(args), dict(kwargs or {}))
    try:
        with (
            isolated(),
            torch._dynamo.config.patch(specialize_float=True),
            _fakes(model, inputs, device) as fake,
        ):
            fakes = tree_map(fake, inputs)
            torch.compile(model, backend=backend, dynamic=True)(*fakes[0], **fakes[1])
    except Exception:
        if not plans:
            raise
    if not plans:
        raise CaptureError("the model has no graph to plan")
    return plans[0]


@contextlib.contextmanager
def _fakes(
    model: object, inputs: object, device: torch.device
) -> Iterator[Callable[[object], object]]:
    """If anything is on meta, all tensors are fake ones on one device while it is planned; -> what
    makes the inputs so."""
    owners = list(model.modules()) if isinstance(model, nn.Module) else []
    tables: list[dict[str, Any]] = [t for m in owners for t in (m._parameters, m._buffers)]
    tensors = [x for x in tree_leaves((tables, inputs)) if isinstance(x, torch.Tensor)]
    if not any(x.is_meta for x in tensors):
        yield lambda x: x
        return
    if device.type == "meta":
        device = next((x.device for x in tensors if not x.is_meta), torch.device("cpu"))
    mode, by_id, kept = FakeTensorMode(), {}, [dict(t) for t in tables]

    def fake(x: object) -> object:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) not in by_id:
            with mode:
                like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
            parameter = isinstance(x, nn.Parameter)
            by_id[id(x)] = nn.Parameter(like, x.requires_grad) if parameter else like
            by_id[id(x)].requires_grad_(x.requires_grad)
        return by_id[id(x)]

    try:
        for t in tables:
            t.update({n: fake(x) for n, x in t.items()})
        yield fake
    finally:
        for t, before in zip(tables, kept):
            t.update(before)


def explain(model: Any, name: str | None = None) -> str:
    """The rewritten programs of a compiled model as text, with the schedules of the last call's
    sizes; after the first call.

    model: what `torch.compile` made, or the module in it. name: of a region, parameter or value in
    them; then the text says where the decisions about it come from. Raises `PlanError` before the
    first call, on one rank (which runs plain Inductor), and for an unknown name.
    """
    check_module("explain(...)", model)
    if name is not None:
        check_name("explain(...)", name)
    root = getattr(model, "_orig_mod", model)
    graphs = GRAPHS.get(root, [])
    if not graphs:
        raise PlanError(
            "the model has no compiled graph yet: call it first (one rank runs plain Inductor)"
        )
    if name is None:
        return "\n\n".join(_explained(g) for g in graphs)
    for g in reversed(graphs):
        with contextlib.suppress(PlanError):
            return origin(g.rewritten, name, g.sizes or g.captured.program.hints)
    return origin(graphs[-1].rewritten, name, graphs[-1].sizes)


def _explained(graph: Compiled) -> str:
    return _text(graph.rewritten, graph.place.axis.size, graph.sizes)


def _text(rewritten: Unit, ranks: int, sizes: Mapping[sympy.Symbol, int]) -> str:
    schedules, kept = {}, []
    if rewritten.choice.leaves and all(s in sizes for s in rewritten.symbols):
        values = [sizes[s] for s in rewritten.symbols]
        names = [name for name, _, _ in rewritten.choice.regions]
        for n in names:
            if n in rewritten.bodies:
                body = rewritten.bodies[n]
                rows = [int(e.chunk_rows(ranks, sizes)) for e in body.extents]
                schedules[n] = choose(body, ranks, values, rows)
        kept = lines(rewritten.keepings, sizes)
        kept += attended.lines(rewritten, ranks, sizes)
    report_lines = [str(r) for r in reports(rewritten, sizes or None)]
    return show(rewritten, schedules=schedules, notes=[*kept, *report_lines])
