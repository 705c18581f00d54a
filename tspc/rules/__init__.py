"""Rules, a file for each family of ops. Importing this fills `tspc.factors.registry`."""

from tspc.rules import contract, loss, norm, place, pointwise, random, view

__all__ = ["contract", "loss", "norm", "place", "pointwise", "random", "view"]
