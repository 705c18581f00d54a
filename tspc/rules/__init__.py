"""All rules; importing this fills the registries of `tspc.rule`."""

from tspc.rules import contract, loss, norm, pointwise, random, view

__all__ = ["contract", "loss", "norm", "pointwise", "random", "view"]
