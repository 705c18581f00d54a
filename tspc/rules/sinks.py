"""The rule of attention with sinks."""

from __future__ import annotations

from tspc.rule import Op, Rule, apply, computed
from tspc.sinks import SINK_ATTENTION


@computed(SINK_ATTENTION)
def attention(op: Op) -> list:
    """As torch's attention; a sink goes with its head."""
    h = "(k g)" if op.args["enable_gqa"] else "k"
    mask = " ".join(["b", h, "q", "t"][-len(op.ins[3] or op.ins[0]) :])
    text = f"b {h} q d, b k t d, b k t e, {mask}, {h} -> b {h} q e"
    at = "q" if op.args["is_causal"] else ""
    return apply(Rule.parse(text, exchange="t", whole="d", at=at), op)
