"""The scripts of examples/scripts: plain and with the one line under torchrun on 2 ranks they print
the same curve, resumed ones its end; docs/scripts.md holds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "scripts"
RUN = str(ROOT / "tests" / "support" / "run_script.py")
PAGE = ROOT / "docs" / "scripts.md"
LIMIT = 600.0  # seconds

pytestmark = pytest.mark.dist


@dataclass(frozen=True)
class Case:
    """tolerance: relative; the losses of library models are computed in float32.

    resumes: on so many ranks, 0 if it does not.
    """

    title: str
    tolerance: float = 1e-6
    resumes: int = 0


CASES = {
    "nanogpt": Case("A loop of one's own: accumulation, evaluation, resuming", 1e-9, 2),
    "generate": Case("Inference with a cache, `generate`"),
    "siamese": Case("Two calls before one backward", 1e-9),
    "ema_scaler": Case("An average of the weights, GradScaler"),
    "muon": Case("Muon", 1e-9),
    "train_step": Case("The whole step compiled"),
    "checkpoint": Case("torch.distributed.checkpoint, written beside the training", resumes=3),
    "accelerate_loop": Case("accelerate", resumes=2),
    "trainer": Case("Trainer", resumes=2),
    "sft_lora": Case("SFTTrainer with LoRA"),
    "dpo": Case("DPOTrainer"),
    "fabric": Case("Lightning Fabric", resumes=2),
}


def start(
    ranks: int, script: Path, *args: str, folder: Path, compiler: str = "eager"
) -> subprocess.Popen[str]:
    """Under torchrun, or by python where ranks is 0."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COMPILER": compiler}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks else []), RUN, str(script), *args]
    folder.mkdir(exist_ok=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)  # type: ignore[call-overload]


def finished(running: subprocess.Popen[str]) -> tuple[str, str, int]:
    """What it printed, the end of its errors, its exit code."""
    try:
        out, errors = running.communicate(timeout=LIMIT)
    finally:
        running.terminate()
    return out, errors[-6000:], running.returncode


def curve(running: subprocess.Popen[str]) -> list[float]:
    """What it printed, on one rank only."""
    out, errors, code = finished(running)
    assert code == 0, errors
    printed = [line for line in out.splitlines() if line.startswith("[") and line.endswith("]")]
    assert len(printed) == 1, out
    return json.loads(printed[0])


def both(
    script: Path, *args: str, folder: Path, compiler: str = "eager"
) -> tuple[list[float], list[float]]:
    """What it prints on one device, and with the one line on two ranks."""
    runs = [
        start(0, script, *args, folder=folder / "plain"),
        start(2, script, "--tsp", *args, folder=folder / "on_ranks", compiler=compiler),
    ]
    try:
        one, many = [curve(r) for r in runs]
    finally:
        for r in runs:
            r.terminate()
    assert len(one) > 2
    return one, many


@pytest.mark.integrations
@pytest.mark.parametrize("name", list(CASES))
def test_curves_are_equal(name: str, tmp_path: Path) -> None:
    case, script = CASES[name], SCRIPTS / f"{name}.py"
    one, many = both(script, folder=tmp_path)
    assert many == pytest.approx(one, rel=case.tolerance, abs=0.0)
    if case.resumes:
        folder = tmp_path / "on_ranks"
        again = curve(start(case.resumes, script, "--tsp", "--resume", folder=folder))
        assert len(again) > 2
        assert again == pytest.approx(one[-len(again) :], rel=case.tolerance, abs=0.0)


@pytest.mark.integrations
@pytest.mark.parametrize("name", ["nanogpt", "generate", "accelerate_loop"])
def test_curves_are_equal_under_inductor(name: str, tmp_path: Path) -> None:
    one, many = both(SCRIPTS / f"{name}.py", folder=tmp_path, compiler="inductor")
    assert many == pytest.approx(one, rel=CASES[name].tolerance, abs=0.0)


@pytest.mark.integrations
def test_curves_are_close_in_bf16(tmp_path: Path) -> None:
    one, many = both(SCRIPTS / "trainer.py", "--bf16", folder=tmp_path)
    assert many == pytest.approx(one, rel=2e-3, abs=0.0)


def page() -> str:
    parts = [
        "# Scripts",
        "Whole scripts as people write them. Each runs by `python` on one device, and with `--tsp` "
        "under `torchrun`\non any number of ranks; `make integrations` runs each both ways and "
        "compares what it prints. Models are tiny\nand data are drawn, so that nothing is "
        "downloaded.",
    ]
    for name, case in CASES.items():
        code = (SCRIPTS / f"{name}.py").read_text()
        parts.append(f"## {case.title}\n\n`examples/scripts/{name}.py`\n\n```python\n{code}```")
    return "\n\n".join(parts) + "\n"


def test_page_holds_the_scripts(request: pytest.FixtureRequest) -> None:
    assert {p.stem for p in SCRIPTS.glob("*.py")} == set(CASES)
    if request.config.getoption("--update-golden"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page(), "make rules writes it anew"
