"""Every error that tspc raises on purpose.

The message says what, where (the user's file:line) and what to do.
"""


class TspcError(Exception):
    """Base class."""


class OptionError(TspcError, ValueError):
    """An unknown option or a bad value."""


class PlanError(TspcError):
    """A plan, mesh or model that do not fit each other."""


class RuleError(TspcError):
    """A rule that cannot be parsed or applied."""


class CaptureError(TspcError):
    """A program that cannot be captured."""


class InternalError(CaptureError):
    """An invariant of tspc's own that does not hold: a defect of tspc."""


class UnsupportedError(TspcError):
    """Something that tspc cannot shard, under `strict=True` or where running replicated would be
    wrong."""


class ShardedParameterError(TspcError, RuntimeError):
    """A stale reference to a whole parameter that has been sharded."""


class PendingGradientError(TspcError, RuntimeError):
    """A gradient that `no_sync` keeps was used."""


class IndexRangeError(TspcError, IndexError):
    """An id or a label that the table has no row for."""


class CacheError(TspcError, OSError):
    """No folder for compiled code can be written."""


class RankMismatchError(TspcError, RuntimeError):
    """Ranks of one axis that disagree."""


class RankFailureError(TspcError, RuntimeError):
    """Another rank of the axis did not come to a collective: it ended, hangs, or is elsewhere."""


class NonFiniteError(TspcError, FloatingPointError):
    """`check_nan=True` found a value that is not finite."""


class ParityError(TspcError, AssertionError):
    """`tspc.verify` found a difference beyond the tolerance."""
