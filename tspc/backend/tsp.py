"""The backend: a Dynamo graph -> the function that one rank runs.

`torch.compile(model, backend="tsp", options={...})`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.types import IntLikeType

from tspc.backend.mode import mode_options
from tspc.backend.planned import check_chosen
from tspc.backend.progress import Compiling, stage
from tspc.base.errors import InternalError, PlanError, TspcError, UnsupportedError
from tspc.base.hardware import device_name
from tspc.base.journal import log
from tspc.base.options import Options, parse
from tspc.base.state import MODEL, remembered
from tspc.explain.report import reports, warnings
from tspc.frontend.autocast import off
from tspc.frontend.autograd_grad import reached
from tspc.frontend.capture import Captured, capture
from tspc.frontend.outside import only_shards
from tspc.frontend.overlap import before_writes, dense, overlap, written
from tspc.ir.body import Lengths, evaluate, rows_of
from tspc.ir.layout import Span
from tspc.ir.program import BUFFER, PARAM, PLACEHOLDERS, SEED, Type
from tspc.ir.shard import ShardMap
from tspc.ops.run import LocalProgram
from tspc.passes.analyse.outputs import Result
from tspc.passes.analyse.refused import NOTHING, Refused
from tspc.passes.ladder import after
from tspc.passes.lower.unit import Unit
from tspc.runtime.call import frames as calls
from tspc.runtime.call import inputs as input_check
from tspc.runtime.call.deferred import defer
from tspc.runtime.call.finite import check_outputs
from tspc.runtime.call.lookups import Indices
from tspc.runtime.call.outputs import sharded
from tspc.runtime.call.twice import watched
from tspc.runtime.comm import seed
from tspc.runtime.comm.drivers import distributed
from tspc.runtime.comm.exchange import whole
from tspc.runtime.comm.place import Place
from tspc.runtime.fold.pieces import InductorPieces
from tspc.runtime.lowering import code_cache
from tspc.runtime.lowering.inductor import compile_local
from tspc.runtime.lowering.trace import Fakes, local_fakes
from tspc.runtime.mesh import renew, resolve
from tspc.runtime.params.convert import settle, store
from tspc.runtime.params.modules import in_trace, prepare, shard_of
from tspc.runtime.params.storage import Prologue, Taken, placed
from tspc.seams.compiler import compiled_roots, plainly
from tspc.seams.dynamo import stand_ins
from tspc.seams.lowering import compile_fx
from tspc.seams.sizes import PythonReferenceAnalysis, sympy_interp


@dataclass
class Compiled:
    """One graph as it was compiled, for `tspc.explain`.

    sizes: symbol values of the last call.
    """

    captured: Captured
    rewritten: Unit
    place: Place
    sizes: dict[sympy.Symbol, int] = field(default_factory=dict)


# compiled root -> its graphs, newest last
GRAPHS = remembered(MODEL, weakref.WeakKeyDictionary[torch.nn.Module, list[Compiled]]())


@plainly(TspcError)
def tsp(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend: compile a graph for this rank of the TSP axis; on one rank this is plain
    Inductor. `torch.compile(model, backend="tsp")` calls it. Collective.

    gm, example_inputs: as Dynamo gives them. options: `tspc.base.options.Options` by name. mode: as
    of `torch.compile`, on one rank only. -> a function of the graph's inputs. Raises `OptionError`,
    `PlanError`, `UnsupportedError` for what cannot run, with the place in the model, and
    `RankMismatchError` where the ranks' graphs differ.

    Source: the folded schedules are those of Shyam, Golubeva, Anthony, "Folding Tensor and Sequence
    Parallelism for Memory-Efficient Transformer Training & Inference" (arXiv:2604.26294);
    `stationary` is Megatron's tensor with sequence parallelism (arXiv:2205.05198), `gather` what
    FSDP with context parallelism does.
    """
    chosen = parse(options)
    mode_options(mode)
    traced, example_inputs = example_inputs, [shard_of(x) for x in example_inputs]
    stored = (x for x in example_inputs if isinstance(x, DTensor))
    meshes = [x.device_mesh for x in stored if isinstance(x, torch.nn.Parameter)]
    if chosen.mesh is None:
        chosen = replace(chosen, mesh=meshes[0] if meshes else None)
    place, mesh = resolve(chosen, _device(example_inputs))
    for theirs in meshes:
        if mesh is not None and theirs.shape != mesh.shape:
            raise PlanError(
                f"the parameters are stored on a mesh of {tuple(theirs.shape)} ranks, the options "
                f"give one of {tuple(mesh.shape)}: compile with the mesh of plan.apply"
            )
    if mesh is None or (place.axis.size == 1 and place.replicas is None):
        if chosen.check_nan:
            log.warning("check_nan does nothing on one rank: torch.autograd.detect_anomaly does")
        calls.given()
        compiled: Any = compile_fx(gm, list(traced), config_patches=mode_options(mode))
        return compiled
    check_chosen(chosen, mode, place, gm)
    if only_shards(gm, traced):
        calls.given()
        return gm
    # anomaly mode reads gradients, which have no values while they are traced
    quiet = place.axis.rank != 0
    what = f"a graph of {len(gm.graph.nodes)} ops"
    with torch.autograd.set_detect_anomaly(False), Compiling(what, quiet):
        stage("traces it")
        captured = capture(gm, traced, param_dtype=chosen.param_dtype)
        with off():  # the casts are in the program
            return _compile(captured, chosen, gm, example_inputs, place, mesh)


calls.watch(tsp, prepare)
stand_ins(tsp, in_trace)


def _compile(
    captured: Captured,
    chosen: Options,
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    place: Place,
    mesh: DeviceMesh,
    refused: Refused = NOTHING,
) -> Callable[..., object]:
    """refused: what could not be lowered before; a rank that alone refuses it is told."""
    if chosen.check_inputs is not False:
        if refused:
            input_check.agree(place, refused.told, "after an error inside of tspc refuses")
        else:
            input_check.agree(place, input_check.signature(captured.program), "compiles a graph of")
    device = device_name(_device(example_inputs))
    stage("decides")
    rewritten = captured.rewritten(place.axis.size, place.axis.name, chosen, device, refused)
    findings = reports(rewritten)
    costly = [r for r in findings if r.replicated]
    if chosen.strict and costly:
        raise UnsupportedError(f"{costly[0]}, or allow it by strict=False")
    if any(
        isinstance(p, torch.nn.Parameter) and not isinstance(p, DTensor) for p in example_inputs
    ):
        dims = _storage_dims(captured, rewritten, example_inputs)
        shards = store(gm, mesh, place.axis.name, dims, chosen.cut)
        example_inputs = [shards.get(id(x), x) for x in example_inputs]
    settle(_wanted(captured, rewritten, example_inputs), chosen.cut)
    compiled = Compiled(captured, rewritten, place)
    try:
        run = code_cache.compiled(lambda: _function(compiled, chosen, example_inputs, gm))
    except Exception as e:
        refused = after(rewritten.refused, e, captured.program, chosen.strict)
        return _compile(captured, chosen, gm, example_inputs, place, mesh, refused)
    for line in warnings(findings) if place.axis.rank == 0 else ():
        log.warning(line)
    for root in compiled_roots(gm):
        GRAPHS.setdefault(root, []).append(compiled)
    return run


def _device(example_inputs: Sequence[object]) -> torch.device:
    for x in example_inputs:
        if isinstance(x, torch.nn.Parameter):
            return x.device
    for x in example_inputs:
        if isinstance(x, torch.Tensor):
            return x.device
    return torch.device("cpu")


def _storage_dims(
    captured: Captured, rewritten: Unit, example_inputs: Sequence[object]
) -> dict[int, int | None]:
    out: dict[int, int | None] = {}
    for name, s in rewritten.choice.storages.items():
        out[id(example_inputs[captured.positions[name]])] = s.map.dim if s.map else None
    return out


def _wanted(
    captured: Captured, rewritten: Unit, example_inputs: Sequence[object]
) -> list[tuple[DTensor, Placement]]:
    """The stored parameters, and how the graph takes each."""
    nodes = [n for n in rewritten.typed.program.nodes if n.op == PARAM]
    storages = rewritten.choice.storages
    maps = [storages[n.name].map if n.name in storages else None for n in nodes]
    stored = zip(captured.given(nodes, example_inputs, None), maps)
    return [(x, placed(m)) for x, m in stored if isinstance(x, DTensor)]


def _fakes(compiled: Compiled, example_inputs: Sequence[object]) -> Fakes:
    captured, rewritten = compiled.captured, compiled.rewritten
    hints = captured.program.hints
    types: list[tuple[Type, torch.device]] = []
    nodes = [n for n in rewritten.typed.program.nodes if n.op in PLACEHOLDERS]
    for n, x in zip(nodes, captured.given(nodes, example_inputs, None)):
        types.append((rewritten.stored(n), x.device if x is not None else _device(example_inputs)))
    rows = [int(c) for c in _rows(compiled, hints)]
    return local_fakes(rewritten.symbols, hints, rows, types)


def _rows(compiled: Compiled, sizes: Lengths) -> list[IntLikeType]:
    """C of each sequence."""
    extents, ranks = compiled.rewritten.choice.extents, compiled.place.axis.size
    return [e.chunk_rows(ranks, sizes) for e in extents]


def _dynamos(compiled: Compiled, fakes: Fakes) -> dict[sympy.Symbol, IntLikeType]:
    """Symbol of the local sizes -> what it is of Dynamo's; before lowering, which may fix one."""
    outer = compiled.captured.outer_symbols
    bind: dict[sympy.Symbol, IntLikeType] = {
        v.node.expr: outer[s] for s, v in fakes.symbols.items() if isinstance(v, torch.SymInt)
    }
    rows = zip(fakes.rows, _rows(compiled, outer))
    return bind | {x.node.expr: c for x, c in rows if isinstance(x, torch.SymInt)}


def _compile_bodies(compiled: Compiled, device: torch.device) -> None:
    """Pieces once per structure; what they assume of the sizes is restated for local and for
    gathered tokens."""
    hints, outer = compiled.captured.program.hints, compiled.captured.outer_symbols
    for body in dict.fromkeys(compiled.rewritten.bodies.values()):
        if "pieces" not in body.compiled:
            rows = [int(e.rows(body.ranks, hints)) for e in body.extents]
            body.compiled["pieces"] = InductorPieces(body, hints, rows, device)
        for guard in body.compiled["pieces"].guards:
            for parts in (1, body.ranks):
                rows = [parts * e.rows(body.ranks, outer) for e in body.extents]
                _require(guard, {**outer, **{rows_of(i): n for i, n in enumerate(rows)}})


def _require(guard: sympy.Expr | Boolean, bind: Lengths) -> None:
    """An assumption becomes a guard of Dynamo's."""
    values = {s: bind[s] for s in guard.free_symbols if isinstance(s, sympy.Symbol)}
    if not bool(sympy_interp(PythonReferenceAnalysis, values, guard)):
        raise InternalError(f"the local program assumes {guard}, which does not hold")


def _lowered(
    compiled: Compiled, options: Options, example_inputs: Sequence[object]
) -> Callable[..., Sequence[Any]]:
    """One rank's program and the pieces of its folds, compiled."""
    fakes = _fakes(compiled, example_inputs)
    stage("compiles its folds")
    if options.compiler == "inductor":
        _compile_bodies(compiled, _device(example_inputs))
    bind = _dynamos(compiled, fakes)
    stage("compiles the rest")
    unit = compiled.rewritten
    program = LocalProgram(unit.local, (*unit.symbols, *unit.chunks))
    run_local = compile_local(program, fakes, options.compiler)
    for guard in fakes.env.guards:  # what tracing and lowering assumed of the local sizes
        _require(guard.expr, bind)
    return run_local


def _function(
    compiled: Compiled, options: Options, example_inputs: Sequence[object], gm: torch.fx.GraphModule
) -> Callable[..., object]:
    captured, rewritten, place = compiled.captured, compiled.rewritten, compiled.place
    run_local = _lowered(compiled, options, example_inputs)
    nodes = [n for n in rewritten.typed.program.nodes if n.op in PLACEHOLDERS]
    device = _device(example_inputs)
    examples = captured.given(nodes, example_inputs, None)
    sharded = [i for i, x in enumerate(examples) if isinstance(x, DTensor)]
    maps = _maps(compiled, {nodes[i].name: examples[i] for i in sharded})
    plain = [i for i, n in enumerate(nodes) if i not in sharded and n.name != SEED]
    names = [nodes[i].name for i in sharded]
    wanted = reached(gm, [i for i, r in enumerate(rewritten.results) if r and r.kind != "deferred"])
    due = frozenset(n for n in names if captured.positions[n] in wanted)
    context = options.reduce_dtype, options.check_nan, due, rewritten
    taken = Taken(place, names, maps, *context)
    positions = [None if n.name == SEED else captured.positions[n.name] for n in nodes]
    inputs = [nodes[i].name for i in plain]
    lasting = frozenset(nodes[i].name for i in plain if nodes[i].op == BUFFER)
    same = input_check.facts(captured.program), input_check.graph_in_words(captured.program)
    check = input_check.Checker(place, options.check_inputs, inputs, lasting, *same, names)
    numbers = [s for s, (_, dim) in captured.symbols.items() if dim is None]
    indices = Indices(rewritten.lookups, device)

    def run(*args: object) -> object:
        calls.ran()
        sizes = captured.sizes(args)
        compiled.sizes = sizes
        rows = [int(c) for c in _rows(compiled, sizes)]
        shared = overlap(captured.writes, args, captured.names)
        kept = before_writes(captured.writes, args)
        values: list[Any] = [None if i is None else kept[i] for i in positions]
        for i in plain:
            values[i] = dense(values[i])
        called, stored = ([values[i] for i in at] for at in (plain, sharded))
        renew(place, options, stored, device)
        wrong = shared or indices(sizes, dict(zip(inputs, called)))
        check(called, stored, [sizes[s] for s in numbers], str(shared or ""))
        if wrong is not None:
            raise wrong
        if rewritten.draws:
            values[positions.index(None)] = seed.shared(place, device)
        if sharded:
            for i, local in zip(sharded, Prologue.apply(taken, *stored)):
                values[i] = dense(local)
        values = watched(values, plain)
        with off():
            outs = run_local(*(sizes[s] for s in rewritten.symbols), *rows, *values)
        if options.check_nan:
            named = zip(_output_names(captured, len(outs)), outs)
            check_outputs(place, [*named], [(n.name, x) for n, x in zip(nodes, values)])
        return written(captured.writes, captured.same, args, _results(compiled, outs, sizes, rows))

    return run


def _maps(compiled: Compiled, stored: Mapping[str, DTensor]) -> list[ShardMap | None]:
    """How the graph takes each stored parameter; those stored otherwise are told."""
    maps, elsewhere = [], []
    for name, x in stored.items():
        storage = compiled.rewritten.choice.storages.get(name)
        maps.append(storage.map if storage is not None else None)
        there, wanted = x.placements[0], placed(maps[-1])
        if there != wanted:
            elsewhere.append(f"{name} ({there}, wanted {wanted})")
    if elsewhere and compiled.place.axis.rank == 0:
        log.warning(
            f"{len(elsewhere)} parameters are stored otherwise than this graph takes them, and "
            f"exchanged at every call: {elsewhere[0]}" + ", ..." * (len(elsewhere) > 1)
        )
    return maps


def _output_names(captured: Captured, count: int) -> list[str]:
    """What each result of the local program is: an output, or the new value of an input."""
    plain = [f"output {i}" for i in range(count - len(captured.writes))]
    return plain + [f"the new value of {captured.names[i]}" for i in captured.writes]


def _results(
    compiled: Compiled,
    outs: Sequence[Any],
    sizes: Mapping[sympy.Symbol, int],
    rows_of_each: Sequence[int],
) -> list[object]:
    """rows_of_each: c of each sequence."""
    place, extents = compiled.place, compiled.rewritten.choice.extents
    out = []
    for x, r in zip(outs, compiled.rewritten.results):
        if r is None or r.kind == "whole":
            out.append(x if r is None else r.given(x, sizes))
            continue
        shape = tuple(evaluate(s, sizes) for s in r.shape)
        extent, rows = extents[r.sequence], rows_of_each[r.sequence]
        length = int(evaluate(extent.length, sizes))
        span = Span(extent.layout(place.axis.size), rows, length)
        if r.kind == "sharded":
            out.append(sharded(x, place, span, r.dim, shape))
            continue

        steps = (span, x, r.dim, evaluate(r.lead, sizes), "outputs")

        def gather(steps=steps, r: Result = r) -> torch.Tensor:
            what = "the read of a deferred output"
            return r.given(distributed(whole(*steps), place.axis, place.groups, what), sizes)

        if r.ranges:
            shape = tuple(evaluate(s, sizes) for s in r.ranges[-1].shape)
        out.append(defer(gather, shape, r.dtype, x.device))
    return out
