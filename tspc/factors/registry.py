"""Which op has which rule; see `tspc.factors.notation` for how a rule is written."""

from __future__ import annotations

from collections.abc import Callable

from tspc.base.errors import RuleError
from tspc.base.state import CODE, remembered
from tspc.factors.notation import Computed, Rule
from tspc.seams.tensors import OpOverload, OpOverloadPacket

RULES: dict[OpOverload, Rule] = remembered(CODE, {})
COMPUTED: dict[OpOverload, Computed] = remembered(CODE, {})
ONCE: dict[OpOverload, int] = remembered(CODE, {})  # op -> the operand that is added after the sum


def rule(op: object, text: str, once: int | None = None, **roles: str) -> None:
    """Declare how the dims of an op's results come from those of its operands, for all programs
    that are compiled from now on. Without a rule an op runs replicated.

    op: a `torch.library.custom_op`, or an op of `torch.ops` or one of its overloads. text: in the
    notation of `tspc/factors/notation.py`, tensor operands in schema order. once: the operand that
    is added after a sum. roles: role -> letters. Raises `RuleError` for a text that does not parse
    or does not fit the op's schema, an unknown role, what is no op, and a second rule for an op.
    """
    overload = overload_of(op)
    _unique(overload)
    parsed = Rule.parse(text, () if once is None else once, **roles)
    tensors = sum("Tensor" in str(a.type) for a in overload._schema.arguments)
    for side, said, most in (
        ("operands", parsed.ins, tensors),
        ("results", parsed.outs, len(overload._schema.returns)),
    ):
        if len(said) > most:
            raise RuleError(f"{text!r} has {len(said)} {side}, {overload._schema} has {most}")
    RULES[overload] = parsed
    if once is not None:
        ONCE[overload] = once


def overload_of(op: object) -> OpOverload:
    """Of a custom op, a packet of overloads or an overload; raises `RuleError` for others."""
    op = getattr(op, "_opoverload", op)
    if isinstance(op, OpOverloadPacket):
        names = op.overloads()
        if len(names) != 1:
            raise RuleError(f"{op} has the overloads {', '.join(names)}: give one of them")
        op = getattr(op, names[0])
    if not isinstance(op, OpOverload):
        raise RuleError(
            f"rule(...) takes an op of torch.ops or a torch.library.custom_op, not {op!r}"
        )
    return op


def _unique(op: OpOverload) -> None:
    if op in RULES or op in COMPUTED:
        raise RuleError(f"two rules for {op}")


def computed(*ops: OpOverload, once: int | None = None) -> Callable[[Computed], Computed]:
    def register(fn: Computed) -> Computed:
        for op in ops:
            _unique(op)
            COMPUTED[op] = fn
            if once is not None:
                ONCE[op] = once
        return fn

    return register
