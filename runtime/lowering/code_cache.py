"""Inductor's folder of compiled code, as other processes left it: what a killed compile left half
written is removed, and a folder that cannot be written is left for one of this process alone."""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tspc.base.errors import CacheError
from tspc.base.journal import log
from tspc.base.state import PROCESS, remembered
from tspc.seams.lowering import cache_dir
from tspc.seams.tensors import FileLock

T = TypeVar("T")
FOLDER = "TORCHINDUCTOR_CACHE_DIR"
ROOM = 64 * 2**20  # bytes that a folder in place of a full one must have free
_FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_prepared: set[str] = remembered(PROCESS, set())


def compiled(compile_graphs: Callable[[], T]) -> T:
    """Call what compiles, with a folder that it can write to; once more in another folder if that
    one turns out to be full or closed. Raises `CacheError` if no folder is left."""
    _prepare()
    try:
        return compile_graphs()
    except Exception as e:
        reason = _reason(e)
        if not reason:
            raise
        _move(reason, e)
        return compile_graphs()


def _prepare() -> None:
    """Once per folder and process."""
    try:
        folder = cache_dir()
        if folder in _prepared:
            return
        os.makedirs(os.path.join(folder, "locks"), exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        closed = next((p for p in _written(Path(folder)) if not os.access(p, os.W_OK)), None)
        if closed is not None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(closed))
    except OSError as e:
        _move(str(e), e)
        return
    _prepared.add(folder)
    for file in unfinished(Path(folder)):
        with FileLock(_lock(file), timeout=0):
            file.unlink(missing_ok=True)
        log.warning("%s was left half written by a compile that ended: removed", file)


def _written(folder: Path) -> Iterator[Path]:
    """What a compile opens for writing: the folders, and the lock of each file."""
    yield from (Path(x.path) for x in os.scandir(folder) if x.is_dir())
    yield from (Path(x.path) for x in os.scandir(folder / "locks"))


def unfinished(folder: Path) -> list[Path]:
    """Libraries in the cache that end before what their header announces, and that nobody is
    compiling now."""
    files = []
    for file in folder.glob("*/*.so"):
        try:
            if not _whole(file):
                with FileLock(_lock(file), timeout=0):
                    pass
                files.append(file)
        except (OSError, TimeoutError):  # another process removed or compiles it
            continue
    return files


def _lock(file: Path) -> str:
    """The lock under which Inductor makes it."""
    return str(file.parent.parent / "locks" / f"{file.name.split('.')[0]}.lock")


def _whole(file: Path) -> bool:
    """An ELF file of 64 bits ends with its table of sections; of others only that they are not
    empty."""
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(64)
    if not head.startswith(b"\x7fELF") or head[4:5] != b"\x02":
        return size > 0 and not b"\x7fELF".startswith(head[:4])
    if len(head) < 64:
        return False
    (start,) = struct.unpack_from("<Q", head, 0x28)
    each, count = struct.unpack_from("<HH", head, 0x3A)
    return start > 0 and size >= start + each * count


def _reason(error: BaseException | None) -> str:
    """Why the folder cannot be written to, if that is what ended the compile."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL | _CLOSED:
            return str(error)
        if os.strerror(errno.ENOSPC) in str(error):  # said by the compiler's process
            return os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return ""


def _move(reason: str, cause: Exception) -> None:
    """Another folder, of this process alone, gone at its end."""
    before = os.environ.get(FOLDER, "")
    for place in (tempfile.gettempdir(), "/dev/shm"):
        try:
            if before.startswith(os.path.join(place, "tspc_cache_")):
                continue
            if shutil.disk_usage(place).free < ROOM:
                continue
            folder = tempfile.mkdtemp(prefix="tspc_cache_", dir=place)
        except OSError:
            continue
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[FOLDER] = folder
        _prepared.add(folder)
        log.warning(
            "the folder of compiled code %s cannot be used (%s): %s, of this process alone, "
            "takes its place; set %s to one that can be written",
            before,
            reason,
            folder,
            FOLDER,
        )
        return
    raise CacheError(
        f"the folder of compiled code {before} cannot be used ({reason}) and no other has room: "
        f"set {FOLDER} to a folder that can be written"
    ) from cause
