"""The type of an autograd function's context: torch's own has all that it names."""

from __future__ import annotations

import torch

from tspc.base.context import Arguments, Context, Keywords


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, times: int) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.times = times
        ctx.set_materialize_grads(False)
        return x**times

    @staticmethod
    def backward(ctx: Context, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        assert ctx.needs_input_grad == (True, False)
        return g * ctx.times * x ** (ctx.times - 1), None


def test_torchs_context_has_what_the_type_names() -> None:
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    args: Arguments = (x, 2)
    keywords: Keywords = {}
    y = torch.Tensor(Doubled.apply(*args, **keywords))
    y.backward()
    assert y.item() == 9 and x.grad is not None and x.grad.item() == 6
    names = set(vars(Context)) & set(dir(torch.autograd.function.FunctionCtx))
    assert {"save_for_backward", "mark_non_differentiable", "set_materialize_grads"} <= names
