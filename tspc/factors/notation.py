"""The rule notation, parsed to data, and its application to the operands of one op.

    rule(aten.linear.default, "... i, o i, o -> ... o", reduce="i", once=2)

A letter is a factor, a space is between factors, a comma between tensors, `(a b)` is one dim of two
factors with the major first, `...` are leading dims (right-aligned, broadcast). A dim of size 1
matches any letter. A letter that is only on the left vanishes, and must say how:

    reduce    summed: a cut leaves a partial sum
    whole     needed whole by every element of the output
    select    indexed by an integer operand
    exchange  met across ranks inside of the op
    lse       reduced by a merge of log-sum-exps

A letter that is only on the right is new; one that a piece cannot make is `whole`. A letter that
stays may have a role too:

    at        the op reads its position (`is_causal`): a piece must know its offset
    halo      a piece reads rows of others
    scan      a piece reads the sum of all before it

`once=i`: operand i is added after the sum, so only once. `halo` and `scan` are of ops that have a
form for pieces. See docs/design.md, "Factors".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from tspc.base.context import Keywords
from tspc.base.errors import RuleError
from tspc.factors.factor import Dim, Dims, Factor, Factors, Size, divide
from tspc.ir.kinds import ALONG
from tspc.ir.program import Node, Ref

ROLES = ("reduce", "whole", "select", "exchange", "lse", "at", "halo", "scan")
KEPT = ("at", "halo", "scan")  # of a letter that stays
Pattern = tuple[str | tuple[str, ...], ...]  # of a tensor: "...", "1" or letters
Key = str | tuple[str, int]  # a letter, or a leading dim counted from the right
Computed = Callable[["Op"], Sequence[Dims]]  # -> the dims of the results


@dataclass(frozen=True)
class Rule:
    ins: tuple[Pattern, ...]
    outs: tuple[Pattern, ...]
    roles: tuple[tuple[str, str], ...] = ()  # (letter, role)
    once: tuple[int, ...] = ()

    @staticmethod
    def parse(text: str, once: int | Sequence[int] = (), /, **roles: str) -> Rule:
        def tensor(t: str) -> Pattern:
            toks = re.findall(r"\([^)]*\)|\.\.\.|\S+", t.strip())
            return tuple(x if x in ("...", "1") else tuple(x.strip("()").split()) for x in toks)

        if text.count("->") != 1:
            raise RuleError(f"{text!r}: operands -> results, with one arrow")
        left, right = text.split("->")
        r = Rule(
            tuple(map(tensor, left.split(","))),
            tuple(map(tensor, right.split(","))),
            tuple((l, k) for k in ROLES for l in roles.pop(k, "").split()),
            (once,) if isinstance(once, int) else tuple(once),
        )
        if roles:
            raise RuleError(
                f"{text!r}: unknown role {sorted(roles)}; valid: {', '.join(ROLES)}, once"
            )
        vanish = r.letters(r.ins) - r.letters(r.outs) - {l for l, _ in r.roles}
        if vanish:
            at = text.index(min(vanish))
            raise RuleError(
                f"{text}\n{' ' * at}^ {', '.join(sorted(vanish))} vanish: say reduce, whole, "
                "select, exchange or lse"
            )
        r.check_roles(text)
        return r

    def check_roles(self, text: str) -> None:
        """Summed, selected and exchanged letters go; a position is read of one that stays; what is
        new on the right can only be made whole."""
        kept, taken = self.letters(self.outs), self.letters(self.ins)
        for l, role in self.roles:
            gone = role in ("reduce", "lse", "select", "exchange")
            if (l in kept) if gone else (role in KEPT and l not in kept):
                stays = "stays" if gone else "vanishes"
                raise RuleError(f"{text}\n{' ' * text.index(l)}^ {l} {stays}: it cannot be {role}")
            if l not in taken and role != "whole":
                raise RuleError(f"{text}\n{' ' * text.index(l)}^ {l} is new: it can only be whole")

    @staticmethod
    def letters(tensors: Iterable[Pattern]) -> set[str]:
        return {l for t in tensors for tok in t if tok not in ("...", "1") for l in tok}

    def __str__(self) -> str:
        def token(x: str | tuple[str, ...]) -> str:
            return x if isinstance(x, str) else x[0] if len(x) == 1 else f"({' '.join(x)})"

        def t(ts: Iterable[Pattern]) -> str:
            return ", ".join(" ".join(map(token, t)) for t in ts)

        return f"{t(self.ins)} -> {t(self.outs)}" + "".join(f", {k}={l}" for l, k in self.roles)


@dataclass
class Event:
    node: str
    operand: int | None  # index among the tensor operands
    dim: Dim  # factors, resolved when read
    role: str
    why: str = ""


@dataclass
class Op:
    """What a rule sees of one node: arguments by schema name, operand dims, the factor table."""

    node: Node
    args: Keywords  # schema name -> value
    refs: Sequence[Ref | None]  # tensor operands in schema order (None where absent)
    ins: list[Dims]  # their dims (none where absent)
    F: Factors
    events: list[Event] = field(default_factory=list)
    # arguments of the slices of the same operand
    siblings: Sequence[Keywords] = ()
    exchanged: int | None = (
        None  # of two output dims with one class, the one that a later op needs whole
    )
    # per operand: replicated by nature, follows the others and refines nothing
    weak: Sequence[bool] = ()

    def shape(self, item: int = 0) -> tuple[Size, ...]:
        """Of a result."""
        t = self.node.types[item]
        assert t is not None, f"{self.node.op} makes no result {item}"
        return t.shape

    def event(
        self, role: str, dim: Iterable[Factor], operand: int | None = None, why: str = ""
    ) -> None:
        if role in ALONG and self.node.op not in ALONG[role]:
            raise RuleError(f"{self.node.op} has no form for pieces: its role cannot be {role}")
        if dim := tuple(dim):
            self.events.append(Event(self.node.name, operand, dim, role, why))

    def new(self, size: Size, why: str) -> Dim:
        """A dim that the op makes as a whole."""
        dim = self.F.dim(size, self.node.name)
        self.event("whole", dim, None, why)
        return dim

    def fresh(self, why: str, item: int = 0) -> list[Dim]:
        """The dims of a result that is made as a whole."""
        t = self.node.types[item]
        return [self.new(n, why) for n in t.shape] if t else []

    def join(self, a: Dim, b: Dim, i: int | None = None, j: int | None = None) -> Dim:
        """Unify operand i's dim with b (met in operand j); the dim to go on with.

        Image against original gathers.
        """
        if not a:
            return b
        if not b:
            return a

        def weak(k: int | None) -> bool:
            return k is not None and k < len(self.weak) and self.weak[k]

        if weak(i):
            return b
        if weak(j):
            return a
        hit: list[Factor] = []
        self.F.on_image = hit.append
        ok = self.F.unify(a, b)
        self.F.on_image = None
        if not ok:
            self.event("whole", a, i, "mismatch")
            self.event("whole", b, j, "mismatch")
        for f in hit:
            left = f in list(self.F.leaves(a))
            self.event("exchange", (f,), i if left else j)
            if left:
                return b
        return a


class _Letters:
    """What the letters of a declared rule stand for at one op."""

    def __init__(self, r: Rule, op: Op):
        self.op, self.F = op, op.F
        self.roles: dict[Key, str] = dict(r.roles)
        self.dims: dict[Key, Dim] = {}
        self.first: dict[Key, int] = {}  # the operand that it was met in first
        self.ones: set[Key] = set()  # those of size 1
        self.uses: list[tuple[Key, int, Dim | None]] = []  # of letters with a role
        self.tokens: dict[int, list[tuple[Key, ...]]] = {}  # operand -> the letters of its dims
        self.lead = 0  # as many dims as "..." stands for

    def read(self, patterns: Sequence[Pattern]) -> None:
        """The operands that have one; what they say of themselves first, then what the others
        say. Composites last: sizes known from the other operands, at most one open."""
        op, late = self.op, []
        operands = range(min(len(patterns), len(op.ins)))
        for i in sorted(operands, key=lambda i: op.weak[i] if op.weak else False):
            if op.refs[i] is None:
                continue
            dims = op.ins[i]
            toks = _spelled(patterns[i], len(dims) - len(patterns[i]) + 1)
            if "..." in patterns[i]:
                self.lead = max(self.lead, len(dims) - len(patterns[i]) + 1)
            assert len(toks) == len(dims), f"{op.node.op}: operand {i} has {len(dims)} dims"
            self.tokens[i] = toks
            for tok, dim in zip(toks, dims):
                if len(tok) == 1:
                    self.bind(tok[0], dim, i)
                elif dim:
                    late.append((tok, dim, i))
        for tok, dim, i in late:
            self.composite(tok, dim, i)
        for key, i, dim in self.uses:
            op.event(self.roles[key], dim or self.dims[key], i)

    def bind(self, key: Key, dim: Dim, i: int) -> None:
        if not dim:
            self.ones.add(key)
            return
        if self.roles.get(key) == "exchange":
            self.op.event("exchange", dim, i)
            return
        before = len(self.op.events)
        bound = key in self.dims
        self.dims[key] = self.op.join(self.dims[key], dim, self.first[key], i) if bound else dim
        self.first.setdefault(key, i)
        gathered = {e.operand for e in self.op.events[before:] if e.role == "exchange"}
        if key in self.roles:
            self.uses.append((key, i, dim if i not in gathered else None))

    def composite(self, tok: tuple[Key, ...], dim: Dim, i: int) -> None:
        sizes: dict[Key, Size] = {l: 1 for l in tok if l in self.ones}
        sizes |= {l: self.F.size(self.dims[l]) for l in tok if l in self.dims}
        left: Size | None = self.F.size(dim)
        for n in sizes.values():
            left = left and divide(left, n)
        parts = left and self.F.regroup([dim], [sizes.get(l, left) for l in tok])
        if not parts:
            self.op.event("whole", dim, i, "composite does not divide")
            return
        for l, d in zip(tok, parts):
            self.bind(l, d, i)

    def follow(self) -> None:
        """A weak operand is read with the factors of the letters."""
        for i, toks in self.tokens.items():
            if self.op.weak and self.op.weak[i]:
                self.op.ins[i] = [
                    sum((self.dims.get(l, d) for l in tok), ()) if d else ()
                    for tok, d in zip(toks, self.op.ins[i])
                ]

    def result(self, pattern: Pattern, shape: Sequence[Size]) -> list[Dim]:
        """The dims of one output; a class met twice in it is gathered."""
        toks = _spelled(pattern, self.lead)
        dims: list[Dim] = [()] * len(toks)
        seen: set[Factor] = set()
        for at in sorted(range(len(toks)), key=lambda k: k == self.op.exchanged):
            if shape[at] == 1 or toks[at] == ("1",):
                continue
            for l in toks[at]:
                if l not in self.dims:
                    self.make(l, shape[at] if len(toks[at]) == 1 else 1)
                twice = {f for f in self.F.leaves(self.dims[l]) if f in seen}
                if twice:  # S x S: the later one is exchanged
                    for i, it in self.tokens.items():
                        if any(l in t for t in it):
                            self.op.event("exchange", twice, i)
                    self.dims[l] = replace(self.F, self.dims[l], twice)
                seen |= set(self.F.leaves(self.dims[l]))
            dims[at] = tuple(f for l in toks[at] for f in self.dims[l])
        return dims

    def make(self, key: Key, size: Size) -> None:
        """A letter that no operand has."""
        self.dims[key] = self.F.dim(size, self.op.node.name)
        if key in self.roles:
            self.op.event(self.roles[key], self.dims[key])


def _spelled(pattern: Pattern, lead: int) -> list[tuple[Key, ...]]:
    """The letters of each dim, where "..." stands for `lead` dims."""
    out: list[tuple[Key, ...]] = []
    for tok in pattern:
        if tok == "...":
            out += [(("...", lead - k),) for k in range(lead)]
        else:
            out.append((tok,) if isinstance(tok, str) else tok)
    return out


def apply(r: Rule, op: Op) -> list[Dims]:
    """Outputs of a declared rule: letters unify over the operands; a class met twice in an output
    is gathered."""
    letters = _Letters(r, op)
    letters.read(r.ins)
    letters.follow()
    outs = r.outs[: len(op.node.types)]
    return [letters.result(pattern, op.shape(item)) for item, pattern in enumerate(outs)]


def replace(F: Factors, dim: Dim, leaves: Collection[Factor]) -> Dim:
    """The dim with these leaves replaced by their images."""
    out: list[Factor] = []
    for f in F.expand(dim):
        if f in leaves:
            out.append(F.image(f))
        elif f.cat:
            out += F.concat([replace(F, d, leaves) for d in f.cat])
        else:
            out.append(f)
    return tuple(out)


def pointwise(op: Op) -> list[Dims]:
    """Broadcast from the right; operands' dims unify."""
    n = len(op.shape())
    letters = [f"d{k}" for k in range(n)]
    ins = [tuple((l,) for l in letters[n - len(d) :]) for d in op.ins]
    return apply(Rule(tuple(ins), (tuple((l,) for l in letters),)), op)


def fallback(op: Op, why: str = "no rule") -> list[Dims]:
    """An op that runs as a whole: every dim whole, outputs new."""
    for i, dims in enumerate(op.ins):
        for d in dims:
            op.event("whole", d, i, why)
    return [op.fresh(why, item) for item in range(len(op.node.types))]
