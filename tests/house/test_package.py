"""What is installed, and running from a checkout: the whole package, passes and runtime in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import tspc
from tspc.runtime.lowering.inductor import hash_of_code

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build reads; it leaves files beside what it builds."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("tspc", "passes", "runtime"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (found,) = folder.glob(f"tspc-{tspc.__version__}-*.whl")
    return found


def modules() -> set[str]:
    own = {f"tspc/{p.relative_to(ROOT / 'tspc')}" for p in (ROOT / "tspc").rglob("*.py")}
    for folder in ("passes", "runtime"):
        own |= {f"tspc/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*.py")}
    return own


def test_a_wheel_holds_every_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n for n in names if n.endswith(".py")} == modules()
    assert "tspc/py.typed" in names


def test_a_source_distribution_holds_every_module(source: Path, tmp_path: Path) -> None:
    text = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", text, str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    root = f"tspc-{tspc.__version__}/"
    with tarfile.open(tmp_path / f"{root[:-1]}.tar.gz") as packed:
        names = {n.removeprefix(root) for n in packed.getnames()}
    assert {n for n in names if n.endswith(".py")} >= modules()
    assert {"tspc/py.typed", "pyproject.toml", "LICENSE"} <= names


STEPS = """
import functools, json, sys
from pathlib import Path
import torch, tspc
from examples import demo

compile_, eager = torch.compile, {"compiler": "eager"}
torch.compile = lambda m, backend: compile_(m, backend=backend, options=eager)
demo.STEPS, demo.LENGTH = 2, 64
demo.train(Path(sys.argv[1]))
assert Path(tspc.__file__).is_relative_to(sys.prefix), tspc.__file__
"""


@pytest.mark.dist
@pytest.mark.wide
def test_an_installed_wheel_runs_the_demos_first_steps(wheel: Path, tmp_path: Path) -> None:
    """In a new environment, which sees the libraries of this one but not its tspc."""
    venv.create(tmp_path / "venv")
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = tmp_path / "venv" / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "steps.py").write_text(STEPS)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    launch = [str(python), "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run([*launch, "steps.py", "out.json"], cwd=tmp_path, env=env, check=True)
    losses = [r["losses"] for r in json.loads((tmp_path / "out.json").read_text())]
    assert len(losses) == 2 and losses[0] == losses[1]
    assert all(0 < x < 10 for x in losses[0]), losses
    assert "fold" in (tmp_path / "demo_program.txt").read_text()


def test_a_new_sub_package_counts_in_the_cache_key(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.py").write_text("x = 1\n")
    seen = [hash_of_code(tmp_path / "own")]
    (tmp_path / "own" / "new" / "inner").mkdir(parents=True)
    (tmp_path / "own" / "new" / "inner" / "b.py").write_text("")
    seen.append(hash_of_code(tmp_path / "own"))
    (tmp_path / "own" / "new" / "inner" / "b.py").write_text("y = 1\n")
    seen.append(hash_of_code(tmp_path / "own"))
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "c.py").write_text("z = 1\n")
    (tmp_path / "own" / "linked").symlink_to("../apart")  # as tspc/passes is
    seen.append(hash_of_code(tmp_path / "own"))
    (tmp_path / "apart" / "c.py").write_text("z = 2\n")
    seen.append(hash_of_code(tmp_path / "own"))
    (tmp_path / "own" / "notes.txt").write_text("no code")
    assert len(set(seen)) == len(seen)
    assert hash_of_code(tmp_path / "own") == seen[-1]


def test_runs_from_the_checkout() -> None:
    text = "import tspc.passes.analyse.fold as m, tspc.runtime.mesh; print(m.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).resolve() == ROOT / "passes" / "analyse" / "fold.py"
