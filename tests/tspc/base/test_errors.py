"""The classes of errors: all are one kind, and of Python's own kind where there is one."""

from __future__ import annotations

import inspect

import pytest

from tspc.base import errors

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
PYTHON = {
    errors.OptionError: ValueError,
    errors.ShardedParameterError: RuntimeError,
    errors.PendingGradientError: RuntimeError,
    errors.IndexRangeError: IndexError,
    errors.CacheError: OSError,
    errors.RankMismatchError: RuntimeError,
    errors.RankFailureError: RuntimeError,
    errors.NonFiniteError: FloatingPointError,
    errors.ParityError: AssertionError,
}


@pytest.mark.parametrize("kind", CLASSES)
def test_each_is_a_tspc_error_with_a_docstring(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.TspcError) and kind.__doc__
    with pytest.raises(errors.TspcError, match="what, where"):
        raise kind("what, where, what to do")


@pytest.mark.parametrize("kind", PYTHON)
def test_those_that_python_has_a_class_for(kind: type[Exception]) -> None:
    with pytest.raises(PYTHON[kind], match="text"):
        raise kind("text")


def test_a_defect_of_tspc_is_an_error_of_capture() -> None:
    assert issubclass(errors.InternalError, errors.CaptureError)
    assert len(CLASSES) == 15
