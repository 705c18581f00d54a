"""Nodes in the place of one: names, types, what is read instead."""

from __future__ import annotations

import torch

from tspc.ir.builder import Builder
from tspc.ir.program import Node, Ref, Type

aten = torch.ops.aten
X = Node("x", "input", types=(Type((2, 3), torch.float32, True),))
N = Node("n", aten.sin.default, (Ref("x"),), {}, X.types, "model.py:3", 2)


def builder(*others: Node) -> Builder:
    b = Builder({n.name: n for n in (X, *others)})
    b.at(N)
    return b


def test_the_node_at_hand_as_another_op() -> None:
    b = builder()
    assert b.end(aten.mul.Tensor, Ref("x"), 2, alpha=1) == Ref("n")
    (n,) = b.nodes
    assert (n.name, n.op, n.args, n.kwargs) == ("n", aten.mul.Tensor, (Ref("x"), 2), {"alpha": 1})
    assert (n.types, n.source, n.recompute) == (X.types, "model.py:3", 2)
    b.at(N, (None,))
    b.end("output")
    assert b.nodes[-1].types == (None,)


def test_names_of_their_own() -> None:
    b = builder(Node("n.1", "input"))
    names = [b.emit(aten.sin.default, Ref("x")).name for _ in range(2)]
    assert names == ["n.2", "n.3"]
    assert b.emit(aten.sin.default, Ref("x"), suffix="of").name == "n.of"
    assert all((n.source, n.recompute) == ("model.py:3", 2) for n in b.nodes)


def test_autograd_follows_what_a_result_is_made_of() -> None:
    b = builder()
    y = b.of(aten.gt.Scalar, (Ref("x"), 0), (2, 3), torch.bool)
    z = b.of(aten.sum.dim_IntList, (Ref("x"), (1,)), [2], torch.float32, keepdim=False)
    w = b.of(aten.to.dtype, (y, torch.float32), (2, 3), torch.float32)
    assert b.type(y) == Type((2, 3), torch.bool) and b.type(z) == Type((2,), torch.float32, True)
    assert not b.type(w).requires_grad and b.by_name[z.name].kwargs == {"keepdim": False}


def test_what_is_read_instead() -> None:
    b = builder()
    y = b.emit(aten.sin.default, Ref("x"), types=X.types)
    b.instead(Ref("x"), y)
    b.instead(Ref("old", 1), Ref("x"))
    z = b.emit(aten.add.Tensor, Ref("x"), Ref("old", 1))
    assert b.by_name[z.name].args == (y, y) and b.type(Ref("x")) == X.type
    with b.scope():
        b.instead(Ref("x"), z)
        assert b.use(Ref("x", 0)) == z
    assert b.use(Ref("x")) == y
