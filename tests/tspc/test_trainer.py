"""The ranks of an axis as one process for accelerate: what each of its functions does instead.
`tests/dist/test_trainer.py` runs the libraries themselves on ranks."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from tests.support.group import alone, cut
from tspc import trainer
from tspc.base.errors import OptionError
from tspc.processes import NAME, Replicas


class Now:
    """What the run is: whether ranks share the model, replicas, whether this rank is a first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shared, self.replicas, self.first = False, Replicas(), True
        monkeypatch.setattr(trainer, "shared", lambda: self.shared)
        monkeypatch.setattr(trainer, "replicas", lambda: self.replicas)
        monkeypatch.setattr(trainer, "first", lambda: self.first)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    return Now(monkeypatch)


TWO = Replicas(2, 0, None, (0, 2))


def given(*args: object, **kwargs: object) -> object:
    """In the place of a library's function."""
    return args, kwargs


def test_wait(now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(dist, "barrier", lambda: seen.append("barrier"))
    trainer._wait(seen.append, "self")
    now.shared = True
    trainer._wait(seen.append, "self")
    assert seen == ["self", "barrier"]


def test_options_of_the_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(registered: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        monkeypatch.setattr(trainer, "_OPTIONS", registered)
        return trainer._compiling(lambda self: {**kwargs}, None)

    assert of({"axis": "a"}, backend="inductor", mode="x") == {"backend": "inductor", "mode": "x"}
    assert of({}, backend="tsp", mode="x") == {"backend": "tsp", "mode": "x"}
    got = of({"axis": "a", "strict": True}, backend="tsp", mode="x", options={"strict": False})
    assert got == {"backend": "tsp", "options": {"axis": "a", "strict": False}}
    for name in ("mesh", "axis", "plan"):
        with pytest.raises(
            OptionError, match=rf"option '{name}' of a TorchDynamoPlugin says which"
        ):
            of({}, backend="tsp", options={name: "other"})


def test_loaders(now: Now) -> None:
    assert trainer._loader(given, 1) == ((1,), {})
    now.shared = True
    assert trainer._loader(given, 1) == ((1,), {"dispatch_batches": False})
    now.replicas = TWO
    assert trainer._loader(given, 1) == ((1,), {})


def test_files_of_each_replica(now: Now) -> None:
    now.shared, now.first = True, False
    assert trainer._written(given, "folder", 1) == "folder"
    now.first = True
    assert trainer._written(given, "folder", 1) == (("folder", 1), {})
    now.shared, now.first = False, False
    assert trainer._written(given, "folder", a=2) == (("folder",), {"a": 2})


@dataclass
class Handler:
    output_trace_dir: str | None


def test_traces(now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    own: Any = SimpleNamespace(profile_handler=Handler("traces"))

    def folder(handler: Any = None) -> object:
        got: Any = trainer._profile(lambda _, h: h, own, handler)  # type: ignore[arg-type, return-value]
        return got.output_trace_dir

    assert folder() == "traces"
    now.shared = True
    assert folder() == "traces"
    now.first = False
    assert folder() == "traces/rank_3" and folder(Handler("x")) == "x/rank_3"
    assert folder(Handler(None)) is None


def test_no_sync(now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "no_sync", lambda model: ("ours", model))
    model: Any = nn.Linear(1, 1)
    assert trainer._quiet(given, "self", model) == (("self", model), {})  # type: ignore[arg-type]
    now.shared = True
    assert trainer._quiet(given, "self", model) == (("self", model), {})  # type: ignore[arg-type]
    now.replicas = TWO
    assert trainer._quiet(given, "self", model) == ("ours", model)  # type: ignore[arg-type]


def test_a_trigger_is_on_all(now: Now) -> None:
    own: Any = SimpleNamespace(flag_tensor=None, device=torch.device("cpu"))
    assert trainer._trigger(lambda self: True, own) and own.flag_tensor is None
    now.shared = True
    with alone():
        assert trainer._trigger(lambda self: bool(self.flag_tensor == 0), own)
        own.flag_tensor = torch.tensor(1)
        assert trainer._trigger(lambda self: bool(self.flag_tensor == 1), own)


def test_uneven_inputs(now: Now) -> None:
    own: Any = SimpleNamespace(even_batches=False)
    assert trainer._join(given, own, "m") == ((own, "m", None), {})
    now.shared, now.replicas = True, TWO
    with pytest.raises(OptionError, match="join_uneven_inputs is for DDP"):
        trainer._join(given, own, "m")
    assert trainer._join(given, own, "m", True) == ((own, "m", True), {})


def test_parameters_that_nobody_averages(now: Now) -> None:
    plain = nn.Parameter(torch.ones(2, 3))
    plain.grad = torch.ones(2, 3)
    with alone() as mesh:
        held = nn.Parameter(cut(torch.ones(4), mesh))
        held.grad = cut(torch.ones(4), mesh)
        groups = [{"params": [held]}, {"params": [plain]}]
        own: Any = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups))
        assert trainer._step(given, own, 1) == ((own, 1), {})
        now.shared, now.replicas = True, TWO
        with pytest.raises(OptionError, match=r"1 of 2 parameters of the optimizer .*\(\(2, 3\)\)"):
            trainer._step(given, own)
        plain.grad = None
        assert trainer._step(given, own) == ((own,), {})


def test_the_random_state(now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import PartialState

    seen: list[object] = []
    trainer._synchronize(lambda *a: seen.append(a), "torch")
    assert seen == [("torch", None)]
    now.shared, now.replicas = True, TWO
    monkeypatch.setattr(PartialState, "device", torch.device("cpu"), raising=False)
    monkeypatch.setattr(
        PartialState, "__init__", lambda self, **_: setattr(self, "device", torch.device("cpu"))
    )
    other = torch.Generator().manual_seed(5).get_state()
    monkeypatch.setattr(dist, "broadcast", lambda x, src: x.copy_(other))
    generator = torch.Generator()
    trainer._synchronize(given, "generator", generator)
    assert torch.equal(generator.get_state(), other)
    before = torch.get_rng_state()
    trainer._synchronize(given, SimpleNamespace(value="torch"))
    assert torch.equal(torch.get_rng_state(), other)
    torch.set_rng_state(before)


def test_one_replica_gathers_as_one_process(now: Now) -> None:
    assert trainer._gather(given, "x") == (("x",), {})
    now.shared = True
    assert trainer._gather(given, "x") == "x"
    now.replicas = TWO
    assert trainer._gather(given, "x") == (("x",), {})


def test_a_search_is_refused(now: Now) -> None:
    assert trainer._search(given, "self", n=1) == (("self",), {"n": 1})
    now.shared = True
    with pytest.raises(OptionError, match="hyperparameter_search sends trials from one process"):
        trainer._search(given, "self")


def test_replicas_of_a_mesh() -> None:
    assert trainer._counted({}) == Replicas()
    with alone() as mesh:
        assert trainer._counted({"mesh": mesh}) == Replicas()


def test_a_late_register_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {"num_processes": 2})
    monkeypatch.setattr(trainer, "_accelerate", lambda: pytest.fail("it goes on"))
    with pytest.raises(OptionError, match="was made before tspc.trainer.register"):
        trainer.register()
    assert NAME == "TSP"


REGISTERED = """
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import tspc.trainer
from tspc import processes, trainer
tspc.trainer.register(strict=True)
tspc.trainer.register(strict=True)
from accelerate import Accelerator, state
from accelerate.utils import DistributedType, DynamoBackend
from transformers import Trainer, TrainingArguments
assert DistributedType["TSP"].value == DynamoBackend["TSP"].value == "TSP"
a = Accelerator(cpu=True, dynamo_backend="tsp")
assert a.num_processes == 1 and a.is_main_process and a.is_last_process
a.wait_for_everyone()
args = TrainingArguments("out", torch_compile_backend="tsp", use_cpu=True, report_to=[])
assert args.should_save and args.should_log
# as on ranks that share the model
s = state.PartialState()
state.PartialState._shared_state["distributed_type"] = DistributedType["TSP"]
assert processes.shared() and s.is_main_process and s.is_last_process and s.use_distributed
assert args.should_save
from transformers import trainer as module
import torch
assert module.distributed_broadcast_scalars([1.0, 2.0]).tolist() == [1, 2]
assert module.nested_gather(None, args.parallel_mode) is None
print("registered")
"""


def test_register_in_a_process_of_its_own(tmp_path: Any) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", REGISTERED],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.stdout.endswith("registered\n"), done.stderr[-2000:]
