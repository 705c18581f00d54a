"""Long runs: kills under torchrun's restarts, many lengths and models in one process, interrupts,
folders of compiled code that cannot be used. `make soak`."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.support.models import make, tokens_of
from tests.support.soak_train import checkpoints

pytestmark = pytest.mark.soak
ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tests" / "support" / "soak_train.py")
KILLS, LENGTHS, MODELS, EXITS = 50, 40, 30, 20
STEPS = 10_000  # more than are made before the last kill
AFTER = 5  # steps that are made after it


def launch(folder: Path, steps: int, restarts: int = 0, **environment: str) -> subprocess.Popen:
    """The training script on 2 ranks, its output in `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "COMPILER": "eager", "PYTHONPATH": str(ROOT), **environment}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [*command, SCRIPT, str(folder), str(steps)], stdout=log, stderr=log, env=env
        )


def curve(folder: Path) -> dict[int, set[str]]:
    """Step -> the losses that were written for it, in all bits; more than one where it was made
    again with another result."""
    found: dict[int, set[str]] = {}
    file = folder / "curve.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        step, loss = json.loads(line)
        found.setdefault(step, set()).add(loss)
    return found


def wait(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def workers(run: subprocess.Popen) -> list[psutil.Process]:
    return [p for p in psutil.Process(run.pid).children() if p.is_running()]


def test_goes_on_after_kills(tmp_path: Path) -> None:
    """The curve of a run whose ranks are killed is one of an undisturbed run, bit for bit, and
    every checkpoint that has its name is whole."""
    killed, once = tmp_path / "killed", tmp_path / "once"
    run = launch(killed, STEPS, restarts=KILLS + 5)
    try:
        last = kill_often(run, killed)
    finally:
        run.send_signal(signal.SIGTERM)
        run.wait(60)
    made = curve(killed)
    twice = {step: losses for step, losses in made.items() if len(losses) > 1}
    assert not twice
    assert launch(once, last).wait(600) == 0
    undisturbed = curve(once)
    assert {s: made[s] for s in undisturbed} == undisturbed and len(undisturbed) == last
    for folder in checkpoints(killed):
        state = dcp.state_dict_loader._load_state_dict_from_keys(checkpoint_id=str(folder))
        assert all(torch.isfinite(x).all() for x in state["model"].values())


def kill_often(run: subprocess.Popen, folder: Path) -> int:
    """-> how many steps an undisturbed run is to make."""
    chance = random.Random(0)

    def told() -> str:
        return (folder / "log").read_text()[-3000:]

    for _ in range(KILLS):
        before = len(curve(folder))
        assert wait(lambda before=before: len(curve(folder)) > before, 120), told()
        time.sleep(chance.random() * 0.5)
        victims = workers(run)
        assert len(victims) == 2
        chance.choice(victims).send_signal(signal.SIGKILL)
        assert wait(lambda victims=victims: not any(v.is_running() for v in victims), 60)
    last = max(curve(folder)) + AFTER
    assert wait(lambda: max(curve(folder)) >= last, 120), told()
    return last


def counted() -> dict[str, int]:
    """What this process holds."""
    gc.collect()
    me = psutil.Process()
    return {
        "MiB": me.memory_info().rss // 2**20,
        "files": me.num_fds(),
        "threads": me.num_threads(),
    }


def many_lengths() -> list[dict[str, int]]:
    model = make("gpt2_like", layers=1)
    compiled = torch.compile(model, backend="tsp", options={"compiler": "eager"})
    found = []
    for i in range(LENGTHS):
        tokens = tokens_of(3 + i)
        compiled(tokens, tokens).backward()
        model.zero_grad()
        found.append(counted())
    return found


def many_models() -> list[dict[str, int]]:
    found = []
    for i in range(MODELS):
        torch._dynamo.reset()
        model = make("gpt2_like", layers=1, seed=i)
        compiled = torch.compile(model, backend="tsp", options={"compiler": "eager"})
        compiled(tokens_of(9), tokens_of(9)).backward()
        del model, compiled
        found.append(counted())
    return found


@pytest.mark.parametrize("life", [many_lengths, many_models])
def test_holds_no_more_after_a_while(world: Any, life: Any) -> None:
    for found in world(2).run(life):
        early, late = found[len(found) // 3], found[-1]
        assert late["files"] <= early["files"] and late["threads"] <= early["threads"], found
        assert late["MiB"] <= early["MiB"] + 40, found


def test_an_interrupt_ends_all_ranks(tmp_path: Path) -> None:
    run = launch(tmp_path / "run", STEPS)
    assert wait(lambda: len(curve(tmp_path / "run")) > 2, 120)
    ranks = workers(run)
    for p in [*ranks, psutil.Process(run.pid)]:
        p.send_signal(signal.SIGINT)
    assert run.wait(60) != 0
    assert wait(lambda: not any(p.is_running() for p in ranks), 10)
    assert b"Fatal Python error" not in (tmp_path / "run" / "log").read_bytes()


UNTIDY = """
import sys
import torch
from examples.gpt2_like import GPT2Like
sys.setswitchinterval(1)  # a thread of the group's is late wherever it can be
torch.manual_seed(0)
compiled = torch.compile(GPT2Like(61, 16, 1, 2, 32), backend="tsp", options={"compiler": "eager"})
tokens = torch.zeros(2, 7, dtype=torch.long)
for _ in range(3):
    compiled(tokens, tokens).backward()
"""


def test_ends_without_destroying_its_group(tmp_path: Path) -> None:
    script = tmp_path / "untidy.py"
    script.write_text(UNTIDY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for _ in range(EXITS):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run([*command, script], env=env, capture_output=True, timeout=120)
        assert ended.returncode == 0, ended.stderr.decode()[-3000:]


@contextlib.contextmanager
def small_file_system(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    if subprocess.call(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]):
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.call(["umount", "-l", str(folder)])


@pytest.mark.parametrize("options", ["ro", "size=256k"], ids=["read-only", "full"])
def test_a_folder_of_code_that_takes_nothing(tmp_path: Path, options: str) -> None:
    folder, code = tmp_path / "run", tmp_path / "code"
    with small_file_system(code, options):
        run = launch(folder, 2, COMPILER="inductor", TORCHINDUCTOR_CACHE_DIR=str(code))
        assert run.wait(600) == 0
    assert len(curve(folder)) == 2 and b"of this process alone" in (folder / "log").read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_a_folder_of_code_of_another_user(tmp_path: Path) -> None:
    """One who may read the folder, and not write to it."""
    folder, shared = tmp_path / "run", tmp_path / "shared"
    first = launch(folder, 1, COMPILER="inductor", TORCHINDUCTOR_CACHE_DIR=str(shared))
    assert first.wait(600) == 0
    for p in [tmp_path, *tmp_path.parents][:3]:
        p.chmod(0o755)
    seen = subprocess.run(
        [sys.executable, "-c", OTHER_USER], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, input=str(shared),
    )  # fmt: skip
    assert seen.returncode == 0 and "of this process alone" in seen.stderr, seen.stderr


OTHER_USER = """
import logging, os, sys
from tspc.runtime.lowering import code_cache
logging.basicConfig()
os.environ[code_cache.FOLDER] = sys.stdin.read()
os.setuid(65534)
print(code_cache.compiled(code_cache.cache_dir))
"""
