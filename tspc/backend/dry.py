"""One rank's step without values: what it keeps, sends and computes, on a device that need not be
there.

In: a rewritten program and its sizes. One rank of D runs forward, backward and the optimizer's
step on fake tensors, op by op, the runtime's own generators included; the other ranks only answer.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.flop_counter import flop_registry

from tspc.base.errors import InternalError, PlanError
from tspc.ir.body import evaluate
from tspc.ir.program import PARAM, PLACEHOLDERS, Node
from tspc.ir.shard import ShardMap
from tspc.ops.run import LocalProgram
from tspc.passes.lower.unit import Unit
from tspc.runtime.attention import facts
from tspc.runtime.comm.drivers import alone, record
from tspc.runtime.comm.place import chunk_rows
from tspc.runtime.comm.repack import fits, repack, repack_backward
from tspc.runtime.comm.requests import Axis
from tspc.runtime.execute import GENERATORS
from tspc.runtime.fold.pieces import TracedPieces
from tspc.runtime.lowering.trace import Fakes, Partitioned, partition
from tspc.runtime.simulate import RESHAPED, arguments
from tspc.seams.fake_device import allow
from tspc.seams.lowering import min_cut_rematerialization_partition
from tspc.seams.tensors import (
    DataDependentOutputException,
    FakeTensorMode,
    TorchDispatchMode,
    tree_leaves,
    tree_map,
)

CPU = torch.device("cpu")
Parameters = Iterable[torch.Tensor]


@dataclass(frozen=True)
class DryRun:
    """One rank's training step, of which nothing was computed. MiB are 2^20 bytes.

    peak: bytes on the device at the most, all that a step has at a time counted op by op, as it is
    before a compiler fuses ops. at: the phase and the op of the peak. memory: bytes by kind then.
    traffic: bytes that leave the rank, by collective, on average over the ranks. flops: of matrix
    products, convolutions and attention. kernels: of attention, by name. waits: what the host waits
    for the device for, each with its place.
    """

    peak: int
    at: str
    memory: Mapping[str, int]
    traffic: Mapping[str, int]
    flops: int
    kernels: tuple[str, ...]
    waits: tuple[str, ...]

    def __str__(self) -> str:
        kinds = ", ".join(f"{k} {_mib(n)}" for k, n in self.memory.items())
        sent = ", ".join(f"{k} {_mib(n)}" for k, n in self.traffic.items()) or "nothing"
        return "\n".join(
            [
                f"peak: {_mib(self.peak)} a rank, at {self.at}: {kinds}",
                f"sent: {_mib(sum(self.traffic.values()))} a rank: {sent}",
                f"computed: {self.flops / 1e12:.3g} TFLOP a rank",
                f"attention: {', '.join(self.kernels) or 'none'}",
                f"waits of the host: {'; '.join(self.waits) or 'none'}",
            ]
        )


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


@dataclass(eq=False)
class _Meter(TorchDispatchMode):
    """Bytes that are alive on a device, by the phase that made them, and FLOPs."""

    kind: str
    phase: str = ""
    where: str = ""
    flops: int = 0
    peak: int = 0
    at: str = ""
    memory: dict[str, int] = field(default_factory=dict)
    alive: dict[int, tuple[str, int]] = field(default_factory=dict)
    total: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, op: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> object:
        out = op(*args, **(kwargs or {}))
        counted = flop_registry.get(op._overloadpacket)
        if counted is not None:
            self.flops += int(counted(*args, **(kwargs or {}), out_val=out))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.hold(x)
        return out

    def hold(self, x: torch.Tensor, kind: str | None = None) -> None:
        """kind: what it is from now on."""
        if x.device.type != self.kind:
            return
        storage = x.untyped_storage()
        key = storage._cdata
        is_new = key not in self.alive
        if not is_new and kind is None:
            return
        self.alive[key] = kind or self.phase, storage.nbytes()
        if is_new:
            weakref.finalize(storage, self._gone, key)
            self.total += storage.nbytes()
            if self.total > self.peak:
                self.peak, self.at = self.total, f"{self.phase}, {self.where}"
                self.memory = self.kinds()

    def _gone(self, key: int) -> None:
        self.total -= self.alive.pop(key)[1]

    def kinds(self) -> dict[str, int]:
        counts = Counter[str]()
        for kind, size in self.alive.values():
            counts[kind] += size
        return dict(counts.most_common())

    def restart(self) -> None:
        """What came before is no part of a step."""
        self.flops, self.peak, self.at, self.memory = 0, self.total, "its start", self.kinds()


@dataclass
class _Rank:
    """Runs graphs of one rank, values without contents. region: whose pieces they are."""

    axis: Axis
    device: torch.device
    meter: _Meter
    region: str = ""

    def run(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> list[Any]:
        """The list is emptied; a value is freed after its last use."""
        env: dict[torch.fx.Node, Any] = {}
        uses = {n: len(n.users) for n in gm.graph.nodes}
        streams = iter(inputs[:])
        inputs.clear()
        for n in gm.graph.nodes:
            if n.op == "placeholder":
                env[n] = next(streams)
            elif n.op == "get_attr":
                env[n] = self.constant(getattr(gm, str(n.target)))
            elif n.op == "output":
                return list(arguments(n.args[0], env))
            else:
                env[n] = self.call(n, arguments(n.args, env), arguments(n.kwargs, env))
            for used in n.all_input_nodes:
                uses[used] -= 1
                if not uses[used]:
                    del env[used]
            if n.op != "placeholder" and not uses[n]:
                del env[n]
        raise InternalError("a graph without output")

    def constant(self, x: object) -> object:
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty(x.shape, dtype=x.dtype, device=self.device)

    def call(self, n: torch.fx.Node, args: Any, kwargs: Any) -> object:
        target: Any = n.target
        args, kwargs = (tree_map(self._moved, x) for x in (args, kwargs))
        if getattr(target, "namespace", "") != "tspc":
            self.meter.where = f"{target} in {self.region}" if self.region else f"{target}"
            return (RESHAPED.get(target) or target)(*args, **kwargs)
        names = [a.name for a in target._schema.arguments]
        full = [*args, *(kwargs[name] for name in names[len(args) :])]
        kind = target._schema.name.split("::")[1]
        region = full[names.index("region")] if "region" in names else n.name
        self.region = self.meter.where = f"{kind} of {region}"
        try:
            return alone(GENERATORS[kind](self.axis, *full), self.axis)
        finally:
            self.region = ""

    def _moved(self, a: object) -> object:
        """The graphs were traced on the CPU."""
        return self.device if isinstance(a, torch.device) and a == CPU else a


def dry_run(
    unit: Unit,
    sizes: Mapping[sympy.Symbol, int],
    device: str,
    optimizer: Callable[[Parameters], torch.optim.Optimizer] | None,
) -> DryRun:
    """A step of rank 0 at these sizes."""
    try:
        allow(device)
    except RuntimeError as e:
        raise PlanError(f"dry_run(...): {e}") from None
    parts = _parts(unit, sizes)
    facts.noted()
    bodies = list(dict.fromkeys(unit.bodies.values()))
    before = [b.compiled.get("pieces") for b in bodies]
    meter = _Meter(torch.device(device).type)
    rank = _Rank(Axis(unit.axis, unit.ranks, 0), torch.device(device), meter)
    try:
        for b in bodies:
            rows = [int(e.rows(b.ranks, sizes)) for e in b.extents]
            b.compiled["pieces"] = TracedPieces(b, sizes, rows, rank.run)
        with FakeTensorMode(), meter, record() as sent:
            _Step(unit, sizes, parts, rank).run(optimizer)
    except DataDependentOutputException as e:
        raise InternalError(f"a step waits for {e.func} at {meter.phase}, {meter.where}") from e
    finally:
        for b, pieces in zip(bodies, before):
            b.compiled["pieces"] = pieces
            if pieces is None:
                del b.compiled["pieces"]
    traffic = Counter[str]()
    for s in sent:
        traffic[s.kind] += round(s.elements * s.dtype.itemsize)
    sums = meter.peak, meter.at, meter.memory, dict(traffic), meter.flops
    return DryRun(*sums, *facts.noted())


def _parts(unit: Unit, sizes: Mapping[sympy.Symbol, int]) -> Partitioned:
    """Of tensors alone: the sizes are numbers in it, which traces several times faster."""
    rows = [int(e.chunk_rows(unit.ranks, sizes)) for e in unit.choice.extents]
    numbers = [*(sizes[s] for s in unit.symbols), *rows]
    program = LocalProgram(unit.local, (*unit.symbols, *unit.chunks))
    types = [unit.stored(n) for n in unit.typed.program.nodes if n.op in PLACEHOLDERS]
    mode, tensors = FakeTensorMode(allow_non_fake_inputs=True), []
    with mode:
        for t in types:
            x = torch.empty([int(evaluate(s, sizes)) for s in t.shape], dtype=t.dtype)
            tensors.append(x.requires_grad_(t.requires_grad))
    fakes = Fakes(mode, ShapeEnv(), {}, [], tensors)
    return partition(
        lambda *args: program(*numbers, *args), fakes, min_cut_rematerialization_partition
    )


@dataclass
class _Step:
    """A training step of a rank."""

    unit: Unit
    sizes: Mapping[sympy.Symbol, int]
    parts: Partitioned
    rank: _Rank

    def run(self, optimizer: Callable[[Parameters], torch.optim.Optimizer] | None) -> None:
        meter, steps = self.rank.meter, None
        meter.phase = "inputs"
        tensors = {n.name: self.stored(n) for n in self.nodes}
        nodes = [n for n in self.nodes if n.op == PARAM and n.type.requires_grad]
        trained = {n.name: tensors[n.name] for n in nodes}
        if optimizer is not None and trained and self.parts.backward is not None:
            steps = optimizer([p.requires_grad_() for p in trained.values()])
            meter.phase = "optimizer state"
            for p in trained.values():
                p.grad = torch.empty_like(p)
            steps.step()
            for p in trained.values():
                p.grad = None
        meter.restart()
        with torch.no_grad():
            grads = self.gradients(tensors)
        meter.phase = "the optimizer's step"
        for n, p in trained.items():
            p.grad = grads.pop(n, None)
        if steps is not None:
            steps.step()

    @property
    def nodes(self) -> list[Node]:
        """What the program is given."""
        return [n for n in self.unit.typed.program.nodes if n.op in PLACEHOLDERS]

    def gradients(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Forward and backward -> gradients of the parameters, as they are stored."""
        parts, meter = self.parts, self.rank.meter
        meter.phase = "activations"
        taken = [self.taken(n, tensors[n.name].detach()) for n in self.nodes]
        outs = self.rank.run(parts.forward, taken)
        if parts.backward is None:
            return {}
        results: Any = parts.forward.graph.output_node().args[0]
        names = [getattr(n, "name", "") for n in results[parts.outputs :]]
        saved = dict(zip(names, outs[parts.outputs :]))
        tangents = iter([torch.empty_like(outs[i]) for i in parts.tangents])
        del outs[parts.outputs :]
        meter.phase = "temporaries of the backward"
        holders = [n.name for n in parts.backward.graph.find_nodes(op="placeholder")]
        inputs = [saved.pop(n) if n in saved else next(tangents) for n in holders]
        grads = self.rank.run(parts.backward, inputs)
        out: dict[str, torch.Tensor] = {}
        for i, n in enumerate(self.nodes):
            g, grads[i] = grads[i], None
            if n.op == PARAM and g is not None:
                out[n.name] = self.returned(n, g, tensors[n.name])
                meter.hold(out[n.name], "gradients")
        return out

    def cut(self, n: Node) -> tuple[ShardMap | None, list[int]]:
        """How a placeholder is cut, and its whole shape."""
        storage = self.unit.choice.storages.get(n.name) if n.op == PARAM else None
        shape = [int(evaluate(s, self.sizes)) for s in n.type.shape]
        return storage.map if storage is not None else None, shape

    def stored(self, n: Node) -> torch.Tensor:
        """As this rank keeps it between steps: of a parameter torch's chunk."""
        m, shape = self.cut(n)
        if m is not None:
            shape[m.dim] = chunk_rows(self.rank.axis, shape[m.dim])
        x = torch.empty(shape, dtype=n.type.dtype, device=self.rank.device)
        self.rank.meter.hold(x, "parameters" if n.op == PARAM else "inputs")
        return x

    def taken(self, n: Node, x: torch.Tensor) -> torch.Tensor:
        """As the program takes it."""
        (m, whole), axis = self.cut(n), self.rank.axis
        if m is None or fits(m, x.shape, whole):
            return x
        self.rank.meter.where = f"repack of {n.name}"
        return alone(repack(axis, m, x, whole[m.dim]), axis)

    def returned(self, n: Node, g: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """The gradient of what is stored."""
        (m, whole), axis = self.cut(n), self.rank.axis
        if m is None or fits(m, stored.shape, whole):
            return g
        self.rank.meter.where = f"repack of the gradient of {n.name}"
        return alone(repack_backward(axis, m, g, whole[m.dim], stored.shape[m.dim]), axis)
