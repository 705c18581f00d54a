"""Inductor's folder of compiled code: half-written files go, a folder that cannot be written is
replaced."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils._filelock import FileLock

import tspc
from tspc.runtime.lowering import code_cache


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of code with one whole library in it."""
    (tmp_path / "ab").mkdir()
    (tmp_path / "locks").mkdir()
    source = min((Path(torch.__file__).parent / "lib").glob("*.so"), key=lambda p: p.stat().st_size)
    return Path(shutil.copy(source, tmp_path / "ab" / "key.main.so"))


@pytest.mark.parametrize("kept", [0, 3, 40, 64, 5000, -1])
def test_a_half_written_library_goes(
    library: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(code_cache.FOLDER, str(library.parent.parent))
    data = library.read_bytes()
    assert code_cache.unfinished(library.parent.parent) == []
    library.write_bytes(data[:kept])
    assert code_cache.compiled(lambda: library.exists()) is False


def test_one_that_is_being_compiled_stays(library: Path) -> None:
    library.write_bytes(b"")
    with FileLock(str(library.parent.parent / "locks" / "key.lock")):
        assert code_cache.unfinished(library.parent.parent) == []
    assert code_cache.unfinished(library.parent.parent) == [library]


def test_a_folder_that_cannot_be_made_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(code_cache.FOLDER, "/proc/no/folder")
    assert code_cache.compiled(code_cache.cache_dir).startswith("/tmp")


def test_a_full_folder_is_replaced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(code_cache.FOLDER, str(tmp_path))
    tried: list[str] = []

    def compile_graphs() -> str:
        tried.append(code_cache.cache_dir())
        if len(tried) == 1:
            raise RuntimeError("compile") from OSError(errno.ENOSPC, "No space left on device")
        return tried[-1]

    assert code_cache.compiled(compile_graphs) == tried[1] != str(tmp_path) == tried[0]


def test_without_any_room_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(code_cache.FOLDER, str(tmp_path))
    monkeypatch.setattr(code_cache, "ROOM", 2**80)

    def compile_graphs() -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(tspc.CacheError, match="set TORCHINDUCTOR_CACHE_DIR to a folder"):
        code_cache.compiled(compile_graphs)


def test_what_else_a_compile_raises_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(code_cache.FOLDER, str(tmp_path))
    with pytest.raises(ZeroDivisionError, match="division"):
        code_cache.compiled(lambda: 1 / 0)
