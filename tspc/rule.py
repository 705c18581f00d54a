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
from dataclasses import dataclass, field

from tspc.errors import RuleError
from tspc.factor import divide

ROLES = ("reduce", "whole", "select", "exchange", "lse", "at", "halo", "scan")
KEPT = ("at", "halo", "scan")  # of a letter that stays
ALONG: dict[str, set[object]] = {"halo": set(), "scan": set()}  # the ops that may have the role


@dataclass(frozen=True)
class Rule:
    ins: tuple  # per tensor: tuple of tokens; a token is "...", "1" or a tuple of letters
    outs: tuple
    roles: tuple = ()  # (letter, role)
    once: tuple = ()

    @staticmethod
    def parse(text, once=(), **roles):
        def tensor(t):
            toks = re.findall(r"\([^)]*\)|\.\.\.|\S+", t.strip())
            return tuple(x if x in ("...", "1") else tuple(x.strip("()").split()) for x in toks)

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

    def check_roles(self, text):
        """Summed, selected and exchanged letters go; a position is read of one that stays; what is
        new on the right can only be made whole."""
        kept, given = self.letters(self.outs), self.letters(self.ins)
        for l, role in self.roles:
            gone = role in ("reduce", "lse", "select", "exchange")
            if (l in kept) if gone else (role in KEPT and l not in kept):
                stays = "stays" if gone else "vanishes"
                raise RuleError(f"{text}\n{' ' * text.index(l)}^ {l} {stays}: it cannot be {role}")
            if l not in given and role != "whole":
                raise RuleError(f"{text}\n{' ' * text.index(l)}^ {l} is new: it can only be whole")

    @staticmethod
    def letters(tensors):
        return {l for t in tensors for tok in t if tok not in ("...", "1") for l in tok}

    def __str__(self):
        def token(x):
            return x if isinstance(x, str) else x[0] if len(x) == 1 else f"({' '.join(x)})"

        def t(ts):
            return ", ".join(" ".join(map(token, t)) for t in ts)

        return f"{t(self.ins)} -> {t(self.outs)}" + "".join(f", {k}={l}" for l, k in self.roles)


RULES, COMPUTED = {}, {}
ONCE = {}  # op -> the operand that is added after the sum


def rule(op, text, **kw):
    _unique(op)
    RULES[op] = Rule.parse(text, **kw)
    if RULES[op].once:
        (ONCE[op],) = RULES[op].once


def _unique(op):
    if op in RULES or op in COMPUTED:
        raise RuleError(f"two rules for {op}")


def computed(*ops, once=None):
    def register(fn):
        for op in ops:
            _unique(op)
            COMPUTED[op] = fn
            if once is not None:
                ONCE[op] = once
        return fn

    return register


@dataclass
class Event:
    node: str
    operand: int | None  # index among the tensor operands
    dim: tuple  # factors, resolved when read
    role: str
    why: str = ""


@dataclass
class Op:
    """What a rule sees of one node: arguments by schema name, operand dims, the factor table."""

    node: object
    args: dict  # schema name -> value
    refs: list  # tensor operands in schema order (None where absent)
    ins: list  # their dims
    F: object
    events: list
    env: object  # value -> (dims, type), program-wide
    siblings: list = field(default_factory=list)  # slices of the same operand
    exchanged: int | None = (
        None  # of two output dims with one class, the one that a later op needs whole
    )
    weak: list = field(
        default_factory=list
    )  # per operand: replicated by nature, follows the others and refines nothing

    def event(self, role, dim, operand=None, why=""):
        if role in ALONG and self.node.op not in ALONG[role]:
            raise RuleError(f"{self.node.op} has no form for pieces: its role cannot be {role}")
        if dim:
            self.events.append(Event(self.node.name, operand, tuple(dim), role, why))

    def new(self, size, why):
        """A dim that the op makes as a whole."""
        dim = self.F.dim(size, self.node.name)
        self.event("whole", dim, None, why)
        return dim

    def fresh(self, why, item=0):
        """The dims of a result that is made as a whole."""
        t = self.node.types[item]
        return [self.new(n, why) for n in t.shape] if t else []

    def join(self, a, b, i=None, j=None):
        """Unify operand i's dim with b (met in operand j); the dim to go on with.

        Image against original gathers.
        """
        if not a:
            return b
        if not b:
            return a

        def weak(k):
            return k is not None and k < len(self.weak) and self.weak[k]

        if weak(i):
            return b
        if weak(j):
            return a
        hit = []
        self.F.on_image = lambda f: hit.append(f)
        ok = self.F.unify(a, b)
        self.F.on_image = None
        if not ok:
            self.F.mismatch.append((self.node.name, self.F.show(a), self.F.show(b)))
            self.event("whole", a, i, "mismatch")
            self.event("whole", b, j, "mismatch")
        for f in hit:
            left = f in list(self.F.leaves(a))
            self.event("exchange", (f,), i if left else j)
            if left:
                return b
        return a


def apply(r, op):
    """Outputs of a declared rule: letters unify over the operands; a class met twice in an output
    is gathered."""
    F, env, first, roles, lead, seen_as, uses, late = op.F, {}, {}, dict(r.roles), 0, {}, [], []

    ones = set()

    def bind(key, dim, i):
        if not dim:
            ones.add(key)
            return
        if roles.get(key) == "exchange":
            op.event("exchange", dim, i)
            return
        before = len(op.events)
        env[key] = op.join(env[key], dim, first[key], i) if key in env else dim
        first.setdefault(key, i)
        gathered = {e.operand for e in op.events[before:] if e.role == "exchange"}
        if key in roles:
            uses.append((key, i, dim if i not in gathered else None))

    strong_first = sorted(
        range(min(len(r.ins), len(op.ins))), key=lambda i: op.weak[i] if op.weak else 0
    )
    for i in strong_first:
        pattern, dims = r.ins[i], op.ins[i]
        if dims is None:
            continue
        toks = list(pattern)
        if "..." in toks:
            at, n = toks.index("..."), len(dims) - len(toks) + 1
            lead = max(lead, n)
            toks[at : at + 1] = [(("...", n - k),) for k in range(n)]
        assert len(toks) == len(dims), f"{op.node.op}: {r}: operand {i} has {len(dims)} dims"
        seen_as[i] = toks
        for tok, dim in zip(toks, dims):
            if len(tok) == 1:
                bind(tok[0], dim, i)
            else:
                late.append((tok, dim, i))
    for tok, dim, i in late:  # composite: sizes known from the other operands, at most one open
        if not dim:
            continue
        known = {l: F.size(env[l]) if l in env else 1 for l in tok if l in env or l in ones}
        rest = F.size(dim)
        for n in known.values():
            rest = divide(rest, n)
        parts = rest and F.regroup([dim], [known.get(l, rest) for l in tok])
        if not parts:
            op.event("whole", dim, i, "composite does not divide")
            continue
        for l, d in zip(tok, parts):
            bind(l, d, i)
    for key, i, dim in uses:
        op.event(roles[key], dim or env[key], i)
    for i, toks in seen_as.items():  # a weak operand is read with the factors of the letters
        if op.weak and op.weak[i]:
            op.ins[i] = [
                () if not d else sum((env.get(l, d) for l in tok), ())
                for tok, d in zip(toks, op.ins[i])
            ]
    outs = []
    for item, pattern in enumerate(r.outs[: len(op.node.types)]):
        shape, toks = op.node.types[item].shape, list(pattern)
        if "..." in toks:
            at = toks.index("...")
            toks[at : at + 1] = [(("...", lead - k),) for k in range(lead)]
        dims, seen = [()] * len(toks), set()
        for at in sorted(range(len(toks)), key=lambda k: k == op.exchanged):
            tok, n = toks[at], shape[at]
            if n == 1 or tok == "1":
                continue
            for l in tok:
                if l not in env:
                    env[l] = F.dim(n, op.node.name) if len(tok) == 1 else ()
                    if l in roles:
                        op.event(roles[l], env[l])
                twice = {f for f in F.leaves(env[l]) if f in seen}
                if twice:  # S x S: the later one is exchanged
                    for i, it in seen_as.items():
                        if any(l in t for t in it):
                            op.event("exchange", twice, i)
                    env[l] = replace(F, env[l], twice)
                seen |= set(F.leaves(env[l]))
            dims[at] = tuple(f for l in tok for f in env[l])
        outs.append(dims)
    return outs


def replace(F, dim, leaves):
    """The dim with these leaves replaced by their images."""
    out = []
    for f in F.expand(dim):
        if f in leaves:
            out.append(F.image(f))
        elif f.cat:
            out += F.concat([replace(F, d, leaves) for d in f.cat])
        else:
            out.append(f)
    return tuple(out)


def pointwise(op):
    """Broadcast from the right; operands' dims unify."""
    n = len(op.node.types[0].shape)
    letters = [f"d{k}" for k in range(n)]
    ins = [tuple((l,) for l in letters[n - len(d) :]) if d is not None else () for d in op.ins]
    return apply(Rule(tuple(ins), (tuple((l,) for l in letters),)), op)


def fallback(op, why="no rule"):
    """An op that runs as a whole: every dim whole, outputs new."""
    for i, dims in enumerate(op.ins):
        for d in dims or ():
            op.event("whole", d, i, why)
    return [op.fresh(why, item) for item in range(len(op.node.types))]
