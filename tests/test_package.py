"""What is installed, and running from a checkout: the whole package, passes and runtime in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_wheel_holds_every_module(tmp_path: Path) -> None:
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    source = tmp_path / "source"  # a build leaves files beside what it builds
    source.mkdir()
    for name in ("tspc", "passes", "runtime"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("tspc-*.whl")
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py")}
    own = {f"tspc/{p.relative_to(ROOT / 'tspc')}" for p in (ROOT / "tspc").rglob("*.py")}
    for folder in ("passes", "runtime"):
        own |= {f"tspc/{folder}/{p.name}" for p in (ROOT / folder).glob("*.py")}
    assert packed == own


def test_runs_from_the_checkout() -> None:
    text = "import tspc.passes.fold as m, tspc.runtime.mesh; print(m.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).resolve() == ROOT / "passes" / "fold.py"
