"""All rules; importing this fills the registries of `tspc.notation`."""

from tspc.rules import contract, loss, norm, place, pointwise, random, view

__all__ = ["contract", "loss", "norm", "place", "pointwise", "random", "view"]
