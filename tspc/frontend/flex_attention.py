"""FlexAttention in a Dynamo graph becomes attention with a mask over queries and keys, of which the
passes make a predicate; what only made its block mask goes.

In: the graph module. Out: one without the higher-order op. What a modification does to the score
alone becomes a text, what it adds an added mask; any other is written out, with a softmax.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch

from tspc.base.errors import UnsupportedError
from tspc.masks.score import SCORE, applied
from tspc.ops.attention import ATTENTION
from tspc.seams.compiler import FLEX, NESTING

Tensor = torch.Tensor
# tracing leaves our op as it is, which is what we want
warnings.filterwarnings("ignore", message=r"(?s)At pre-dispatch tracing.*Found tspc\.")
FRESH = {  # they make memory of their own
    *("clone", "arange", "empty", "zeros", "ones", "full", "empty_like", "zeros_like"),
    *("ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full"),
}
IN_PLACE = {"iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor"}
ADDS = {operator.add, operator.iadd, torch.add, "add", "__add__", "__radd__"}
SUBTRACTS = {operator.sub, torch.sub, "sub", "__sub__"}
PYTHON = {"truediv": "div", "imul": "mul", "itruediv": "div", "iadd": "add", "isub": "sub"}


def inlined(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Raises `UnsupportedError` where the log-sum-exp of FlexAttention is used."""
    if not any(n.target is FLEX for n in gm.graph.nodes):
        return gm
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    reason = getattr(gm, "compile_subgraph_reason", None)
    gm = torch.fx.GraphModule(gm, graph)
    if reason is not None:
        object.__setattr__(gm, "compile_subgraph_reason", reason)
    nodes = [n for n in gm.graph.nodes if n.target is FLEX]
    masks: set[torch.fx.Node] = set()
    for n in nodes:
        q, k, v, score, block_mask, scale, _, buffers, mask_buffers = n.args
        if any(u.target is not operator.getitem or u.args[1] for u in n.users):
            raise UnsupportedError(
                "FlexAttention: its log-sum-exp is used, which the ranks do not share; call "
                "flex_attention without return_lse or return_aux"
            )
        *blocks, mask = block_mask
        args = ((q, k, v), (score, *buffers), (mask, *mask_buffers), scale)
        with gm.graph.inserting_before(n):
            replacement = gm.graph.call_function(attend, args)
        replacement.meta = {**n.meta, "example_value": n.meta["example_value"][0]}
        for user in list(n.users):
            user.replace_all_uses_with(replacement)
            gm.graph.erase_node(user)
        gm.graph.erase_node(n)
        masks |= {b for b in blocks if isinstance(b, torch.fx.Node) and b.op != "placeholder"}
    _prune(gm.graph, masks)
    gm.graph.lint()
    gm.recompile()
    return gm


def _prune(graph: torch.fx.Graph, masks: set[torch.fx.Node]) -> None:
    """Erase what nothing but these values needed, and then the loops of vmap with nothing in."""
    gone, todo = set(masks), list(masks)
    while todo:
        n = todo.pop()
        writes = [u for u in n.users if u.target is operator.setitem and u.args[0] is n]
        more = [x for x in (*n.all_input_nodes, *writes) if x not in gone and x.op != "placeholder"]
        gone.update(more)
        todo += more
    needed = [n for n in gone if _is_needed(n, gone)]
    while needed:
        gone.difference_update(needed)
        needed = [n for n in gone if _is_needed(n, gone)]
    for n in reversed(list(graph.nodes)):
        if n in gone:
            graph.erase_node(n)
    opened: list[tuple[torch.fx.Node, int]] = []
    inside = 0
    for n in list(graph.nodes):
        kind = NESTING.get(n.target) if n.op == "call_function" else None
        if kind == "open":
            opened.append((n, inside))
        elif kind == "close":
            start, before = opened.pop()
            if inside == before:
                graph.erase_node(n)
                graph.erase_node(start)
        elif kind is None:
            inside += 1


def _is_needed(n: torch.fx.Node, gone: set[torch.fx.Node]) -> bool:
    """By one that stays: it uses the value, or is what this writes into, or shares its memory."""
    return any(u not in gone for u in n.users) or (_writes(n) and not _is_own(n.args[0], gone))


def _writes(n: torch.fx.Node) -> bool:
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return n.target is operator.setitem or in_place or name in IN_PLACE


def _is_own(x: object, gone: set[torch.fx.Node]) -> bool:
    """Of memory that nothing which stays can see: back to where it was made, all goes."""
    while isinstance(x, torch.fx.Node):
        if x not in gone:
            return False
        name = x.target if isinstance(x.target, str) else getattr(x.target, "__name__", "")
        if name in FRESH or not x.args:
            return True
        x = x.args[0]
    return True


def attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    score: tuple[Any, ...],
    mask: tuple[Any, ...],
    scale: float,
) -> Tensor:
    """What FlexAttention computes; zeros for a query without a key. score, mask: the modification
    and what it reads."""
    (q, k, v), (score_mod, *score_buffers), (mask_mod, *mask_buffers) = qkv, score, mask
    sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    at = [
        torch.arange(n, device=q.device).view([n if d == e else 1 for e in range(4)])
        for d, n in enumerate(sizes)
    ]
    keep = mask_mod(*at, *mask_buffers)
    reading, grouped = _read(score_mod), q.shape[1] != k.shape[1]
    if reading is not None:
        text, last, adds = reading
        masking = keep
        if adds:
            zero = torch.zeros((1, 1, 1, 1), dtype=q.dtype, device=q.device)
            constants = {last: zero} if last.op != "placeholder" else None
            operands = (zero, *at, *score_buffers)
            bias = torch.fx.Interpreter(score_mod).run(*operands, initial_env=constants)
            masking = bias.masked_fill(~keep, -torch.inf)
        masking = masking.expand([*torch.broadcast_shapes(masking.shape, (1, 1, *sizes[2:]))])
        return ATTENTION(q, k, v, masking, scale=scale, score=text, grouped=grouped)
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = score_mod((q @ k.transpose(-1, -2)) * scale, *at, *score_buffers)
    seen = keep.any(-1, keepdim=True)
    hidden = torch.where(seen, -torch.inf, 0.0).to(scores.dtype)
    weights = torch.softmax(torch.where(keep, scores, hidden), -1)
    return torch.where(seen, weights, 0.0).to(v.dtype) @ v


def _read(score_mod: torch.fx.GraphModule) -> tuple[str, torch.fx.Node, bool] | None:
    """(the text of what is done to the score itself, the value that it is, whether something that
    does not depend on the score is added after it); None for any other modification."""
    score = next(iter(score_mod.graph.nodes))
    (output,) = score_mod.graph.find_nodes(op="output")
    n = output.args[0]
    n = n[0] if isinstance(n, (tuple, list)) else n
    adds = False
    while n is not score:
        on = [a for a in n.args if isinstance(a, torch.fx.Node) and _depends(a, score)]
        other = [a for a in n.args if isinstance(a, torch.fx.Node) and a not in on]
        minus = n.target in SUBTRACTS
        if not other or len(on) != 1 or n.kwargs or not (minus or n.target in ADDS):
            break
        if minus and n.args[0] is not on[0]:
            return None
        n, adds = on[0], True
    text = _text(n, score)
    return None if text is None else ("" if text == SCORE else text, n, adds)


def _text(n: torch.fx.Node, score: torch.fx.Node) -> str | None:
    """Of what is made of the score by constants alone."""
    if n is score:
        return SCORE
    on = [(i, a) for i, a in enumerate(n.args) if isinstance(a, torch.fx.Node)]
    inner = _text(on[0][1], score) if len(on) == 1 else None
    if inner is None:
        return None
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    name = name.strip("_")
    at = on[0][0]
    args = tuple(inner if i == at else a for i, a in enumerate(n.args))
    return applied(PYTHON.get(name, name), args, n.kwargs, at)


def _depends(n: torch.fx.Node, on: torch.fx.Node) -> bool:
    return n is on or any(_depends(x, on) for x in n.all_input_nodes)
