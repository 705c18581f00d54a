"""Values as text, and back: what `show` writes, a `Reader` reads.

Numbers, strings, dtypes and what else torch names, sizes over symbols as sums and products, tuples,
lists, dicts, and dataclasses that are `textual`. `//` begins a comment. tspc.ir.program adds nodes.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

import sympy
import torch

from tspc.base.state import CODE, remembered
from tspc.seams.sizes import sympy_functions as functions

SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}
DTYPES = {short: dtype for dtype, short in SHORT.items()}
WORDS = {"None": None, "True": True, "False": False, "inf": math.inf, "nan": math.nan, **DTYPES}
STRING = r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\""""
TOKEN = re.compile(
    rf"""(?P<blank>\s+|//[^\n]*)
    | (?P<source>\#[^\n]*)
    | (?P<ref>%(?:[\w.]+|{STRING}))
    | (?P<string>{STRING})
    | (?P<number>\d+(?:\.\d*)?(?:e[+-]?\d+)?)
    | (?P<name>[A-Za-z_][\w.]*)
    | (?P<mark>\*\*|.)""",
    re.X,
)
CLASSES: dict[str, type] = remembered(CODE, {})
T = TypeVar("T")


def textual(cls: type[T]) -> type[T]:
    """A dataclass whose text is the fields that are compared."""
    CLASSES[cls.__name__] = cls
    return cls


def show(value: object) -> str:
    """On one line, but for nodes, which have lines of their own."""
    text = getattr(value, "text", None)
    if text is not None:
        return text()
    if isinstance(value, torch.dtype):
        return SHORT.get(value, str(value))
    if isinstance(value, torch.device):
        return f"device({str(value)!r})"
    if isinstance(value, sympy.Basic):
        return _size(value)
    if isinstance(value, tuple):
        if value and hasattr(value[0], "line"):
            return "{\n" + indented("\n".join(n.line() for n in value)) + "\n}"
        return f"({', '.join(map(show, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{show(k)}: {show(v)}" for k, v in value.items()) + "}"
    if type(value).__name__ in CLASSES:
        return fields_of(value)
    if isinstance(value, complex):
        return f"complex({value.real!r}, {value.imag!r})"
    return repr(value)


def fields_of(value: Any) -> str:
    """A dataclass that is `textual`."""
    compared = (f for f in fields(value) if f.compare and getattr(value, f.name) != _default(f))
    parts = ", ".join(f"{f.name}={show(getattr(value, f.name))}" for f in compared)
    return f"{type(value).__name__}({parts})"


def declared(
    symbols: Iterable[sympy.Symbol], hints: Mapping[sympy.Symbol, int] | None = None
) -> str:
    """A line for each."""

    def line(s: sympy.Symbol) -> str:
        kinds = "".join(f" {k}" if v else f" not {k}" for k, v in s._assumptions_orig.items())
        return f"symbol {s}{kinds}" + (f" = {hints[s]}" if hints and s in hints else "")

    return "\n".join(map(line, symbols))


def indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.split("\n"))


def _default(f: Field) -> object:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _size(e: sympy.Basic) -> str:
    """Operands in sympy's own order, so that they can be put together without being evaluated."""
    if isinstance(e, (sympy.Integer, sympy.Symbol)) or e in (sympy.true, sympy.false):
        return str(e)
    if isinstance(e, sympy.Rational):
        return f"Rational({e.p}, {e.q})"
    if isinstance(e, sympy.Float) or not e.args:
        return sympy.srepr(e)
    parts = [_size(a) for a in e.args]
    held = [
        f"({p})" if isinstance(a, (sympy.Add, sympy.Mul, sympy.Pow)) else p
        for a, p in zip(e.args, parts)
    ]
    if isinstance(e, sympy.Add):
        return " + ".join(
            h if isinstance(a, sympy.Add) else p for a, p, h in zip(e.args, parts, held)
        )
    if isinstance(e, sympy.Mul):
        return "*".join(
            p if isinstance(a, sympy.Pow) else h for a, p, h in zip(e.args, parts, held)
        )
    if isinstance(e, sympy.Pow):
        return "**".join(held)
    name = type(e).__name__
    space = "" if getattr(functions, name, None) is type(e) else "sympy."
    return f"{space}{name}({', '.join(parts)})"


class Reader:
    """Reads what `show` writes, token by token."""

    def __init__(self, text: str):
        self.source, self.symbols = text, dict[str, sympy.Symbol]()
        self.tokens = [
            (m.lastgroup or "", m[m.lastgroup or 0], m.end())
            for m in TOKEN.finditer(text)
            if m.lastgroup not in (None, "blank")
        ]
        self.tokens.append(("end", "", len(text)))
        self.at = 0

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[min(self.at + ahead, len(self.tokens) - 1)][1]

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    def next(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1][1]

    def take(self, mark: str) -> bool:
        """Whether it comes next, and is read."""
        if self.kind in ("mark", "name") and self.peek() == mark:
            self.at += 1
            return True
        return False

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            raise self.error(repr(mark))

    def error(self, wanted: str) -> ValueError:
        line = self.source[: self.tokens[self.at][2]].count("\n") + 1
        return ValueError(f"line {line}: {self.peek() or 'the end'!r} where {wanted} is expected")

    def many(self, end: str, one: Callable[[], T]) -> list[T]:
        """What stands before the mark `end`, between commas."""
        out: list[T] = []
        while not self.take(end):
            out.append(one())
            if not self.take(","):
                self.expect(end)
                break
        return out

    def of(self, kind: type[T], wanted: str) -> T:
        """The next value, which is one of these."""
        at, value = self.at, self.atom()
        if not isinstance(value, kind):
            self.at = at
            raise self.error(wanted)
        return value

    def value(self) -> object:
        """A sum."""
        return self.chain("+", self.product, sympy.Add)

    def product(self) -> object:
        return self.chain("*", self.power, sympy.Mul)

    def power(self) -> object:
        return self.chain("**", self.atom, sympy.Pow)

    def chain(self, mark: str, one: Callable[[], object], op: Callable[..., object]) -> object:
        parts = [one()]
        while self.take(mark):
            parts.append(one())
        return parts[0] if len(parts) == 1 else op(*parts, evaluate=False)

    def atom(self) -> object:
        if self.take("-"):
            x = self.atom()
            if not isinstance(x, int | float | complex | sympy.Expr):
                raise self.error("a number")
            return -x
        if self.kind == "number":
            number = self.next()
            return float(number) if re.search(r"[.e]", number) else int(number)
        if self.kind == "string":
            return ast.literal_eval(self.next())
        if self.take("("):
            return self.bracketed()
        if self.take("["):
            return self.many("]", self.value)
        if self.take("{"):
            return dict(self.many("}", self.pair))
        if self.kind == "name":
            return self.named(self.next())
        raise self.error("a value")

    def bracketed(self) -> object:
        """A tuple, or one value in brackets."""
        if self.take(")"):
            return ()
        first = self.value()
        if self.take(")"):
            return first
        self.expect(",")
        return (first, *self.many(")", self.value))

    def pair(self) -> tuple[object, object]:
        key = self.value()
        self.expect(":")
        return key, self.value()

    def named(self, name: str) -> object:
        if name in WORDS:
            return WORDS[name]
        if name in self.symbols:
            return self.symbols[name]
        if name.startswith("torch."):
            return getattr(torch, name.removeprefix("torch."))
        if not self.take("("):
            self.at -= 1
            raise self.error("a value")
        args, keywords = self.arguments()
        if name in CLASSES:
            return CLASSES[name](*args, **keywords)
        if name in ("device", "complex"):
            kinds: dict[str, Callable[..., object]] = {"device": torch.device, "complex": complex}
            return kinds[name](*args)
        fn = getattr(functions, name, None) or getattr(sympy, name.removeprefix("sympy."))
        lazy = issubclass(fn, sympy.Function | sympy.core.relational.Relational)
        return fn(*args, **keywords, **({"evaluate": False} if lazy else {}))

    def arguments(self) -> tuple[list[object], dict[str, object]]:
        """After the bracket: values, and values by name."""
        args: list[object] = []
        keywords: dict[str, object] = {}

        def one() -> None:
            if self.kind == "name" and self.peek(1) == "=":
                name = self.next()
                self.expect("=")
                keywords[name] = self.value()
            else:
                args.append(self.value())

        self.many(")", one)
        return args, keywords
