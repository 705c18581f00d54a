"""`torch.compile(mode=...)` is what Inductor makes of it."""

from __future__ import annotations

import pytest

from tspc.backend.mode import mode_options
from tspc.base.errors import OptionError


def test_options_of_a_mode() -> None:
    assert mode_options(None) == {} == mode_options("default")
    got = mode_options("max-autotune-no-cudagraphs")
    assert got["max_autotune"] is True
    got.clear()
    assert mode_options("max-autotune-no-cudagraphs")


@pytest.mark.parametrize("mode", ["fast", 3, ""])
def test_no_mode(mode: str) -> None:
    with pytest.raises(OptionError, match="valid: 'default', "):
        mode_options(mode)
