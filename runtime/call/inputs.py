"""Ranks of one axis must run the same graph on the same data, and train alike: before anything else
of a call is sent, a few hashes go round on a group of their own, so a rank that differs is told,
never waited for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tspc.base.errors import RankMismatchError
from tspc.base.state import CALL, PROCESS, remembered
from tspc.ir.body import evaluate
from tspc.ir.program import PARAM, PLACEHOLDERS, Program, Size
from tspc.runtime.call import drift
from tspc.runtime.call.digest import digest, digest_there, is_plain
from tspc.runtime.comm import failures
from tspc.runtime.comm.direct import Alike
from tspc.runtime.comm.drivers import distributed
from tspc.runtime.comm.place import Place
from tspc.runtime.comm.requests import AllGather, Axis, Steps

CHECK = "the check that starts a call or a compile"
FROZEN = "frozen parameters"  # a fact of a graph: their names
KEPT = 256  # calls of other shapes or numbers whose hashes are kept
LISTED = 4  # inputs that a message names
ADVICE = (
    "all ranks of the TSP axis run the same model on the same, full batch; use one sampler seed "
    "(DistributedSampler with rank = the data-parallel rank)"
)
ALIKE = (
    "all ranks call backward(), optimizer.step() and zero_grad() alike; what skips one of them (a "
    "loss that is not finite, a bad batch) decides by what is the same on all ranks"
)
Named = tuple[str, torch.dtype, torch.Size]  # an input
SAME_GRAPHS = (
    "all replicas run the same model, with the same parameters used and frozen, on batches of "
    "their own"
)


@dataclass(frozen=True)
class Section:
    """What a rank tells of one thing, in words, if another rank tells otherwise."""

    verb: str
    facts: Mapping[str, str]
    advice: str


@dataclass
class Checker:
    """Called with the inputs of each call, the stored parameters and the numbers among the inputs.

    mode: False compares nothing. names: of the inputs; lasting: those that are buffers, read again
    only when they were changed. facts: what all calls of this graph have in common. graph: what the
    ranks run, as text; params: names of the stored parameters.
    """

    place: Place
    mode: str | bool
    names: Sequence[str]
    lasting: frozenset[str]
    facts: Mapping[str, str]
    graph: str
    params: Sequence[str]
    calls: int = 0
    hashes: dict[object, tuple[int, int]] = field(default_factory=dict)
    kept: dict[str, tuple[tuple[int, int, int], int]] = field(default_factory=dict)
    taken: drift.Taken = field(default_factory=drift.Taken)

    def __post_init__(self) -> None:
        drift.watch()
        self.alike = Alike(self.place.axis, self.place.groups["checks"])

    def __call__(
        self,
        tensors: Sequence[object],
        params: Sequence[torch.Tensor] = (),
        numbers: Sequence[int] = (),
        shared: str = "",
    ) -> None:
        """shared: what is said of inputs in the same memory, where that matters."""
        if self.mode is False:
            return
        arrived()
        self.calls += 1
        named, here, late = list[Named](), dict[str, int](), dict[str, torch.Tensor]()
        for n, x in zip(self.names, tensors):
            if not isinstance(x, torch.Tensor):
                continue
            named.append((n, x.dtype, x.shape))
            if is_plain(x):
                if _is_late(x):
                    late[n] = x
                else:
                    here[n] = self._digest(n, x)
        steps = [self.calls, *self.taken.since(params)]
        grads = drift.gradients(params)
        called = self._hashes(named, numbers)

        def words() -> list[int]:
            return [*called, *map(_hash_of, (here.values(), steps, grads)), memory]

        def sections() -> list[Section]:
            shapes = {n: text(dtype, shape) for n, dtype, shape in named}
            contents = {n: f"{h & (1 << 64) - 1:016x}" for n, h in here.items()}
            return [
                Section("was called with", {**self.facts, **shapes}, ADVICE),
                Section("runs", self._graph(numbers), ADVICE),
                Section("was given other values in", contents, ADVICE),
                Section("has made", _steps_in_words(steps, self.params), ALIKE),
                Section("holds", _gradients_in_words(grads, self.params), ALIKE),
                Section("was called with", {"memory of its inputs": shared or "apart"}, ADVICE),
            ]

        memory = _hash(shared.encode()) if shared else 0
        word = hash((*called, *here.values(), *steps, *grads, memory))
        _compare(self.alike, word, words, sections)
        if late:
            self._send(late)

    def _graph(self, numbers: Sequence[int]) -> dict[str, str]:
        numbered = {f"number {i}": str(n) for i, n in enumerate(numbers)}
        return {"the graph": self.graph, **numbered}

    def _hashes(self, named: Sequence[Named], numbers: Sequence[int]) -> tuple[int, int]:
        """Of the shapes and of the graph with its numbers; kept for the next call like this."""
        key = *numbers, *named
        hashes = self.hashes.get(key)
        if hashes is None:
            shapes = [(n, text(dtype, shape)) for n, dtype, shape in named]
            if len(self.hashes) >= KEPT:
                self.hashes.clear()
            called, run = repr((self.facts, shapes)), repr(self._graph(numbers))
            hashes = self.hashes[key] = _hash(called.encode()), _hash(run.encode())
        return hashes

    def _digest(self, name: str, x: torch.Tensor) -> int:
        if name not in self.lasting or x.is_inference():
            return digest(x)
        state = (id(x), x.data_ptr(), x._version)
        if self.kept.get(name, (None, 0))[0] != state:
            self.kept[name] = state, digest(x)
        return self.kept[name][1]

    def _send(self, late: Mapping[str, torch.Tensor]) -> None:
        """The digests of what is on an accelerator, made and compared there."""
        digests = torch.stack([digest_there(x) for x in late.values()])
        gathered = distributed(
            _gather(digests, "activations"), self.place.axis, self.place.groups, CHECK
        )
        alike = (gathered == gathered[:1]).all(0).to("cpu", non_blocking=True)
        event = None
        if digests.device.type != "cpu":
            event = torch.Event(digests.device)
            event.record()
        if not _HOOKS:
            _HOOKS.append(register_optimizer_step_pre_hook(lambda *_: arrived()))
        _LATE.append(_Late(self.place.axis.name, list(late), alike, event))


def _is_late(x: torch.Tensor) -> bool:
    return not x.is_cpu


@dataclass(frozen=True)
class _Late:
    """A comparison on its way from an accelerator. same: of each name."""

    axis: str
    names: Sequence[str]
    same: torch.Tensor
    event: torch.Event | None


_LATE: list[_Late] = remembered(CALL, [])
_HOOKS: list[object] = remembered(PROCESS, [])


def arrived() -> None:
    """Raises `RankMismatchError` if a comparison that was sent found a difference: before an
    optimizer's step and at the next call. It was made long before; nothing waits."""
    while _LATE:
        late = _LATE.pop(0)
        if late.event is not None:
            late.event.synchronize()
        wrong = [n for n, good in zip(late.names, late.same.tolist()) if not good]
        if wrong:
            _LATE.clear()
            raise RankMismatchError(
                f"the ranks of axis {late.axis!r} were given other values in "
                f"{', '.join(wrong[:LISTED])}. Do this: {ADVICE}"
            )


def _steps_in_words(steps: Sequence[int], params: Sequence[str]) -> dict[str, str]:
    calls, taken, *changed = steps
    facts = {"calls of this graph": str(calls), "optimizer steps": str(taken)}
    return facts | {f"changes in place of {n}": str(k) for n, k in zip(params, changed)}


def _gradients_in_words(grads: Sequence[int], params: Sequence[str]) -> dict[str, str]:
    named = {-1: "none", 0: "one"}
    words = [named.get(k, f"one that was changed in place {k} times") for k in grads]
    return {f"as gradient of {n}": w for n, w in zip(params, words)}


def agree(place: Place, facts: Mapping[str, str], verb: str) -> None:
    """Compare what each rank of the TSP axis tells, by name; collective.

    Raises `RankMismatchError` on all ranks, with what differs.
    """
    _agree(place.axis, place.groups["checks"], facts, verb, ADVICE)


def replicas_agree(place: Place, facts: Mapping[str, str], verb: str) -> None:
    """The same over the replicas, if there are any."""
    if place.replicas is not None:
        _agree(place.replicas, place.groups["replica checks"], facts, verb, SAME_GRAPHS)


def _agree(
    axis: Axis, group: dist.ProcessGroup, facts: Mapping[str, str], verb: str, advice: str
) -> None:
    word = _hash(repr((verb, sorted(facts.items()))).encode())
    alike = Alike(axis, group)
    _compare(alike, word, lambda: [word], lambda: [Section(verb, facts, advice)])


def _compare(
    alike: Alike,
    word: int,
    words: Callable[[], Sequence[int]],
    sections: Callable[[], Sequence[Section]],
) -> None:
    """word: of all that is compared; words: each of one section. The first section that differs is
    told; another number of words is of another kind of comparison."""
    axis, group = alike.axis, alike.group
    try:
        if alike(word):
            return
        said: list[Any] = [None] * axis.size
        dist.all_gather_object(said, (words(), sections()), group)
    except RuntimeError as e:
        failures.fail(e, CHECK, group, "AllReduce of checks")
    heard = [list(w) for w, _ in said]
    k = next((i for i, of in enumerate(zip(*heard)) if any(w != of[0] for w in of)), 0)
    wrong = [r for r, w in enumerate(heard) if w[k] != heard[0][k] or len(w) != len(heard[0])]
    parts = [s[min(k, len(s) - 1)] for _, s in said]
    lines = "; ".join(f"rank {r} {_differs(parts, r)}" for r in (0, wrong[0]))
    raise RankMismatchError(
        f"ranks {wrong} of axis {axis.name!r} differ from rank 0: {lines}. "
        f"Do this: {parts[0].advice}"
    )


def _differs(said: Sequence[Section], rank: int) -> str:
    """What this rank tells otherwise than some other rank."""
    verb, facts = said[rank].verb, said[rank].facts
    common = [n for n, v in facts.items() if any(o.facts.get(n, v) != v for o in said)]
    alone = [n for n in facts if any(n not in o.facts for o in said)]
    names = (common or alone)[:LISTED]
    listed = ", ".join(f"{n}: {_shown(n, facts[n], [o.facts for o in said])}" for n in names)
    return f"{verb} {listed or 'nothing'}"


def _shown(name: str, value: str, sections: Sequence[Mapping[str, str]]) -> str:
    """Of the frozen parameters only those that are not frozen on all ranks."""
    if name != FROZEN:
        return value
    others = [set(o.get(name, "").split(", ")) for o in sections]
    parts = [n for n in value.split(", ") if not all(n in e for e in others)]
    more = f" and {len(parts) - LISTED} more" if len(parts) > LISTED else ""
    return ", ".join(parts[:LISTED]) + more if parts else "those of all ranks"


def _gather(x: torch.Tensor, link: str) -> Steps[torch.Tensor]:
    handle = yield AllGather(x, link)
    return handle.wait()


def _hash(data: bytes) -> int:
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _hash_of(numbers: Iterable[int]) -> int:
    """Python's own of a tuple: of integers, it is the same in every process."""
    return hash(tuple(numbers))


def text(dtype: torch.dtype, shape: Sequence[Size]) -> str:
    """A type as messages show it: "int64[2, 8]"."""
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"


def facts(program: Program) -> dict[str, str]:
    """What every call of this graph has in common."""
    params = [n for n in program.nodes if n.op == PARAM]
    frozen = [n.name for n in params if not n.type.requires_grad]
    return {
        "grad mode": "enabled" if torch.is_grad_enabled() else "disabled",
        FROZEN: ", ".join(frozen) or "none",
    }


def signature(program: Program) -> dict[str, str]:
    """The graph that a rank compiles, to be compared over the axis: its inputs at their present
    sizes, whether they want gradients, and its ops."""
    out = facts(program)
    for n in program.nodes:
        if n.op in PLACEHOLDERS:
            shape = [evaluate(s, program.hints) for s in n.type.shape]
            frozen = " frozen" if n.op == PARAM and not n.type.requires_grad else ""
            out[n.name] = text(n.type.dtype, shape) + frozen
    return {**out, **_calls(program)}


def _calls(program: Program) -> dict[str, str]:
    """The ops of a graph, each with the fractions that stand in it."""
    out: dict[str, str] = {}
    for n in program.nodes:
        if n.op not in PLACEHOLDERS:
            arguments = (*n.args, *n.kwargs.values())
            numbers = [str(a) for a in arguments if isinstance(a, float)]
            out[f"op {len(out)}"] = " ".join([str(n.op), *numbers])
    return out


def graph_in_words(program: Program) -> str:
    """One text for graphs that are the same on ranks."""
    calls = repr(_calls(program)).encode()
    grad = "with" if torch.is_grad_enabled() else "without"
    key = hashlib.blake2b(calls, digest_size=4).hexdigest()
    return f"{key} of {len(program.nodes)} nodes {grad} gradients"
