"""Positions of a dim that belong to a piece of a factor."""

from __future__ import annotations

import torch

from tspc.factors.factor import Factors
from tspc.factors.placement import indices


def test_of_a_product_by_its_place_in_it() -> None:
    F = Factors()
    a, b, c = F.new(2), F.new(3), F.new(4)
    places = torch.arange(24).view(2, 3, 4)
    piece = [2, 0]
    assert indices(F, (a, b, c), b, piece) == places[:, piece].flatten().tolist()
    assert indices(F, (a, b, c), a, [1]) == places[1].flatten().tolist()
    assert indices(F, (a, b, c), c, [3]) == places[..., 3].flatten().tolist()


def test_segments_without_it_are_in_every_piece() -> None:
    F = Factors()
    h, d = F.new(3), F.dim(2)
    dim = F.concat([(h, *d), F.dim(5), (h,)])
    assert indices(F, dim, h, [1]) == [2, 3, *range(6, 11), 12]


def test_without_the_factor_all_of_it() -> None:
    F = Factors()
    assert indices(F, F.dim(4), F.new(2), [0]) == [0, 1, 2, 3]
