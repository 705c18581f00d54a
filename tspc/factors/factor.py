"""Named sizes with union, split (ordered product) and segments (concatenation).

A dim is a tuple of factors, major first; () is size 1. A factor is a leaf, or a link to the
factor that it was merged into, or refined once and for all: `seq` (an ordered product of factors)
or `cat` (dims laid end to end). A dim therefore reads as a sum of products of leaves: `H·d`, `q·d
+ k·d + k·d`, `H·(d + d + d)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

import sympy
from typing_extensions import TypeIs

from tspc.ir.program import Size

Dim = tuple["Factor", ...]
Dims = Sequence[Dim]  # of a tensor

MAX_SEGMENTS = 16


@lru_cache(None)
def divide(a: Size, b: Size) -> Size | None:
    """A / b if exact for every value of the symbols, else None."""
    if a == b:
        return 1
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    q = sympy.cancel(sympy.sympify(a) / b)
    num, den = sympy.fraction(q)
    if den != 1:
        return None
    return int(q) if q.is_Integer else q


def norm(n: Size) -> Size:
    """Plain ints in place of sympy integers."""
    return int(n) if isinstance(n, sympy.Integer) else n


def const(n: Size) -> TypeIs[int]:
    return isinstance(n, int)


class Factor:
    """A named size: a leaf, a link to the factor that it merged into, or refined into `seq` or
    `cat`."""

    __slots__ = ("id", "size", "origin", "link", "seq", "cat", "image", "image_of", "part_of")

    def __init__(self, id: int, size: Size, origin: str):
        self.id, self.size, self.origin = id, size, origin
        self.link: Factor | None = None
        self.seq: Dim | None = None
        self.cat: tuple[Dim, ...] | None = None
        self.image: Factor | None = None
        self.image_of: Factor | None = None
        self.part_of: Factor | None = None

    def __repr__(self) -> str:
        return f"f{self.id}:{self.size}"


class Factors:
    """The table of all factors of a program.

    `hints` gives each symbol an example value.
    """

    def __init__(self, hints: Mapping[sympy.Symbol, int] | None = None):
        self.all: list[Factor] = []
        self.hints = hints or {}
        self.on_image: Callable[[Factor], object] | None = (
            None  # the factor that has to be gathered
        )

    # construction
    def new(self, size: Size, origin: str = "") -> Factor:
        f = Factor(len(self.all), norm(size), origin)
        self.all.append(f)
        return f

    def dim(self, size: Size, origin: str = "") -> Dim:
        return () if size == 1 else (self.new(size, origin),)

    def concat(self, dims: Dims, origin: str = "") -> Dim:
        """A dim that is `dims` end to end; segments of segments are flattened."""
        flat = self.flat(dims)
        if len(flat) == 1:
            return flat[0]
        f = self.new(sum(self.size(d) for d in flat), origin)
        f.cat = tuple(flat)
        return (f,)

    def image(self, f: Factor) -> Factor:
        """The gathered twin of a leaf: same size, never merged with it."""
        f = self.find(f)
        if f.image_of:
            return f
        if not f.image:
            f.image = self.new(f.size, f.origin + "'")
            f.image.image_of = f
        return self.find(f.image)

    # reading
    def find(self, f: Factor) -> Factor:
        while f.link:
            if f.link.link:
                f.link = f.link.link
            f = f.link
        return f

    def expand(self, dim: Sequence[Factor]) -> Dim:
        """The dim as roots that are leaves or segmented."""
        out: list[Factor] = []
        for f in dim:
            f = self.find(f)
            if f.seq:
                out += self.expand(f.seq)
            else:
                out.append(f)
        return tuple(out)

    def flat(self, dims: Dims) -> list[Dim]:
        """Segments, those that were themselves cut later spelled out."""
        out: list[Dim] = []
        for d in map(self.expand, dims):
            out += self.flat(d[0].cat) if len(d) == 1 and d[0].cat else [d]
        return out

    def size(self, dim: Sequence[Factor]) -> Size:
        n: Size = 1
        for f in dim:
            n = n * self.find(f).size
        return norm(n)

    def leaves(self, dim: Sequence[Factor]) -> Iterator[Factor]:
        for f in self.expand(dim):
            if f.cat:
                for d in f.cat:
                    yield from self.leaves(d)
            else:
                yield f

    def show(self, dim: Sequence[Factor], names: dict[int, str] | None = None) -> str:
        def one(f: Factor) -> str:
            if f.cat:
                return "(" + " + ".join(self.show(d, names) for d in f.cat) + ")"
            return (names or {}).get(f.id) or f"{f.size}#{f.id}"

        return "·".join(map(one, self.expand(dim))) or "1"

    # refinement
    def split(self, f: Factor, major: Size) -> Dim | None:
        """Refine f into (major, rest); None if it cannot be done exactly."""
        minor = divide(f.size, major)
        if minor is None:
            return None
        if f.cat:  # n equal segments are a product n · segment
            if len(f.cat) != major or any(
                self.size(d) != minor or not self.unify(d, f.cat[0]) for d in f.cat[1:]
            ):
                return None
            f.seq, f.cat = (self.new(major, f.origin), *f.cat[0]), None
        else:
            f.seq = (self.new(major, f.origin), self.new(minor, f.origin))
            if f.image:
                f.image.seq, f.image = tuple(self.image(g) for g in f.seq), None
        return f.seq

    def cut(self, dim: Dim, sizes: Sequence[Size]) -> list[Dim] | None:
        """Refine a dim into segments of these sizes and return them; None if the bounds fall
        inside of a factor."""
        fs = self.expand(dim)
        if not fs:
            return None
        f, minor = fs[0], self.size(fs[1:])
        inner = [q for n in sizes if (q := divide(n, minor)) is not None]
        if len(inner) < len(sizes):
            return None
        if not f.cat:
            f.cat = tuple(self.dim(n, f.origin) for n in inner)
        segs, it = [], self.flat(f.cat)
        for n in inner:
            got: list[Dim] = []
            total: Size = 0
            while total != n and it:
                got.append(it.pop(0))
                total = norm(total + self.size(got[-1]))
                if const(total) and const(n) and total > n:
                    return None
            if total != n:
                return None
            segs.append(self.concat(got, f.origin) + fs[1:])
        return segs

    def regroup(self, dims: Dims, sizes: Sequence[Size]) -> list[Dim] | None:
        """The factors of all dims, in order, cut to the new sizes; None where division is
        not exact."""
        todo, out = [f for d in dims for f in self.expand(d)], []
        for n in sizes:
            got = []
            while n != 1:
                if not todo:
                    return None
                f = self.find(todo.pop(0))
                if f.seq:
                    todo[:0] = self.expand((f,))
                    continue
                q = divide(n, f.size)
                if q is None:
                    if divide(f.size, n) is None or self.split(f, n) is None:
                        return None
                    todo[:0] = self.expand((f,))
                    continue
                got.append(f)
                n = q
            out.append(tuple(got))
        return None if todo else out

    # union
    def same(self, a: Size, b: Size) -> bool:
        """Sizes are equal, or both are symbolic and equal by their hints: then a guard is
        assumed."""
        if a == b:
            return True
        if const(a) or const(b):
            return False

        def example(e: sympy.Expr) -> sympy.Basic:
            return e.subs([(s, n) for s, n in self.hints.items()])

        return example(a) == example(b)

    def unify(self, a: Sequence[Factor], b: Sequence[Factor]) -> bool:
        """Make two dims one, refining the coarser where they differ.

        False (and no further merges) on a mismatch.
        """
        a, b = list(self.expand(a)), list(self.expand(b))
        while a and b:
            x, y = self.find(a[0]), self.find(b[0])
            if x.seq or y.seq:
                a[:1], b[:1] = self.expand((x,)), self.expand((y,))
                continue
            if x is y or divide(x.size, y.size) == 1:
                if not self.merge(x, y):
                    return False
                del a[0], b[0]
            elif (
                divide(x.size, y.size) is not None
                and self.split(x, y.size)
                or divide(y.size, x.size) is not None
                and self.split(y, x.size)
            ):
                continue
            elif self.same(x.size, y.size):
                if not self.merge(x, y):
                    return False
                del a[0], b[0]
            else:
                return False
        return not a and not b

    def merge(self, x: Factor, y: Factor) -> bool:
        if x is y:
            return True
        if x.image is y or y.image is x:
            if self.on_image:
                self.on_image(x if x.image is y else y)
            return True
        if x.cat and y.cat:
            return self.merge_segments(x, y)
        if x.cat or (y.image_of is None and x.image_of is not None):
            x, y = y, x  # x becomes a link to y
        if x.image and y.image:
            self.unify((x.image,), (y.image,))
        elif x.image:
            y.image, x.image.image_of = x.image, y
        x.link = y
        return True

    def merge_segments(self, x: Factor, y: Factor) -> bool:
        a, b, n = self.flat(x.cat or ()), self.flat(y.cat or ()), 0
        while a and b:
            n += 1
            p, q = self.size(a[0]), self.size(b[0])
            if n > MAX_SEGMENTS:
                return False
            if p == q:
                if not self.unify(a.pop(0), b.pop(0)):
                    return False
            elif const(p) and const(q):
                big, small = (a, q) if p > q else (b, p)
                segs = self.cut(big[0], [small, abs(p - q)])
                if segs is None:
                    return False
                big[:1] = segs
            else:
                return False
        x.link = y
        return not a and not b
