"""make broken: break every function of a module in turn; the test at its path must notice.

`python -m tests.house.broken [MODULE ...]` lists the functions whose breakage is not noticed, of
these modules (names or files; all without any). A broken function does nothing and returns None. A
test file runs once as it is, in a process of its own, where it is seen which test calls which
functions; then once for each function, in a fork, until one of its tests fails.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import gc
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

from tests.house.test_imports import MODULES, ROOT, name
from tests.house.test_map import MODULES as TESTED
from tests.house.test_map import mirrored
from tests.support import preload, world  # noqa: F401  imported once for all forks

PATIENCE = 20, 4  # seconds, and times what its tests take as it is: a loop that does not end
MEMORY = 8 * 2**30  # bytes of address space, of what such a loop may take
OPTIONS = ["-p", "no:cacheprovider", "-x", "--tb=no", "-W", "ignore::pytest.PytestWarning"]
Calls = dict[str, tuple[list[str], float]]  # function -> its tests, the quickest first; seconds


def functions_of(module: str) -> list[FunctionType]:
    """Of a module and its classes, in order, decorated or not."""
    import_module(module)
    file = str(MODULES[module])
    gc.unfreeze()  # what is frozen is not listed
    return sorted(
        (
            f
            for f in gc.get_objects()
            if type(f) is FunctionType
            and f.__module__ == module
            and os.path.realpath(f.__code__.co_filename) == file
            and "<" not in f.__qualname__
            and not is_empty(f)
        ),
        key=lambda f: f.__code__.co_firstlineno,
    )


def is_empty(f: FunctionType) -> bool:
    """A body of `...` or `pass` does nothing as it is."""
    kinds = {i.opname for i in dis.get_instructions(f)}
    values = {i.argval for i in dis.get_instructions(f) if i.opname == "LOAD_CONST"}
    return kinds <= {"RESUME", "NOP", "LOAD_CONST", "RETURN_VALUE"} and values <= {None}


def nothing(code: CodeType) -> CodeType:
    """What takes any arguments and returns None, with as many variables of outer functions."""
    free = code.co_freevars
    names = "".join(f"    {n} = None\n" for n in free)
    uses = f"        ({', '.join(free)},)\n" if free else ""
    inner = f"    def f(*args, **kwargs):\n        return None\n{uses}    return f\n"
    space: dict[str, Any] = {}
    exec(f"def outer():\n{names}{inner}", space)
    return space["outer"]().__code__


def at_import(module: str) -> set[str]:
    """Names of functions that the module itself calls while it is imported: without them its test
    is not even read."""
    todo: list[ast.AST] = list(ast.parse(MODULES[module].read_text()).body)
    out: set[str] = set()
    while todo:
        n = todo.pop()
        if isinstance(n, ast.Call):
            out.add(getattr(n.func, "id", ""))
        functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        inner = getattr(n, "decorator_list", []) if isinstance(n, functions) else None
        todo += ast.iter_child_nodes(n) if inner is None else inner
        out |= {d.id for d in inner or () if isinstance(d, ast.Name)}
    return out


def label(f: FunctionType) -> str:
    return f"{f.__qualname__}:{f.__code__.co_firstlineno}"


class Watch:
    """A plugin of pytest: which tests call which functions, and what they take."""

    def __init__(self, functions: list[FunctionType]) -> None:
        self.names = {f.__code__: label(f) for f in functions}
        self.elsewhere: set[str] = set()  # tests that run on ranks of their own
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, set[str]] = {}
        self.test = ""

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in self.names:
            self.calls.setdefault(self.names[frame.f_code], set()).add(self.test)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.test, begin = item.nodeid, time.monotonic()
        if "world" in getattr(item, "fixturenames", ()):
            self.elsewhere.add(self.test)
        sys.setprofile(self)
        threading.setprofile(self)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            self.seconds[self.test] = time.monotonic() - begin

    def sorted(self) -> Calls:
        took, elsewhere = self.seconds.__getitem__, self.elsewhere
        calls = {f: self.calls.get(f, set()) | elsewhere for f in self.names.values()}
        return {f: (sorted(ts, key=took), sum(map(took, ts))) for f, ts in calls.items() if ts}


def in_a_fork(fn: Callable[[], Any], seconds: float = 0) -> Any:
    """What it returns, in a process of its own; None where it takes longer, or too much memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        signal.alarm(round(seconds))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        value = None
        with contextlib.suppress(BaseException):
            value = fn()
        with os.fdopen(writer, "wb") as out:
            pickle.dump(value, out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as received:
        data = received.read()
    os.waitpid(child, 0)
    return pickle.loads(data) if data else None


def run(tests: list[str], plugins: list[object] | None = None) -> int:
    return int(pytest.main([*OPTIONS, *tests], plugins))


def watched(module: str) -> Calls | None:
    """None where its tests fail as it is."""

    def calls() -> Calls | None:
        watch = Watch(functions_of(module))
        return watch.sorted() if run([name(mirrored(MODULES[module]))], [watch]) == 0 else None

    return in_a_fork(calls)


def notices(f: FunctionType, tests: list[str], seconds: float) -> bool:
    def broken() -> int:
        os.environ["TESTS_BROKEN"] = f"{f.__module__}:{label(f)}"  # for the ranks of a world
        f.__code__ = nothing(f.__code__)
        return run(tests)

    return in_a_fork(broken, PATIENCE[0] + PATIENCE[1] * seconds) != 0


def break_named(name: str) -> None:
    """On a rank: the function that is broken."""
    module, _, wanted = name.partition(":")
    (f,) = (f for f in functions_of(module) if label(f) == wanted)
    f.__code__ = nothing(f.__code__)


def unnoticed(module: str) -> tuple[int, list[str]]:
    """(how many functions, those whose breakage no test notices) of a module."""
    functions, calls = functions_of(module), watched(module)
    if calls is None:
        return len(functions), [f"its tests fail: {name(mirrored(MODULES[module]))}"]
    out = []
    for f in functions:
        if label(f) not in calls and f.__name__ in at_import(module):
            continue
        if label(f) not in calls:
            out.append(f"{label(f)} is not called")
        elif not notices(f, *calls[label(f)]):
            out.append(f"{label(f)} is not noticed")
    return len(functions), out


def main(names: list[str]) -> int:
    os.chdir(ROOT)
    os.environ |= {"TSPC_STRICT_INTERNAL": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    by_name = {name(p): m for m, p in MODULES.items()} | {m: m for m in MODULES}
    chosen = [by_name[n] for n in names] or [m for m, p in MODULES.items() if p in TESTED]
    total, left = 0, 0
    for module in chosen:
        count, lines = unnoticed(module)
        total, left = total + count, left + len(lines)
        print(f"{module}: {count - len(lines)} of {count}", *lines, sep="\n  ", flush=True)
    print(f"{total - left} of {total} noticed")
    return left > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
