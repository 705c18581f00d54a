"""All rules; importing this fills the registries of `tspc.rule`."""

from tspc.rules import contract, loss, norm, place, pointwise, random, sinks, view

__all__ = ["contract", "loss", "norm", "place", "pointwise", "random", "sinks", "view"]
