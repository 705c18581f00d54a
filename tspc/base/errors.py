"""Every error that tspc raises on purpose.

The message says what, where (the user's file:line) and what to do. All of them are `TspcError`s;
where Python has a class for the kind of error, they are of that class too.
"""


class TspcError(Exception):
    """Base class of all errors that tspc raises on purpose, during a compile too."""


class OptionError(TspcError, ValueError):
    """An unknown option, a bad value of one, or a bad argument of a public function. The message
    names the valid ones."""


class PlanError(TspcError):
    """A plan, mesh, checkpoint or model that do not fit each other."""


class RuleError(TspcError):
    """A rule that cannot be parsed (a caret shows the place), a second rule for an op, or a role
    that the op cannot have."""


class CaptureError(TspcError):
    """A program that cannot be captured from the model."""


class InternalError(CaptureError):
    """An invariant of tspc's own that does not hold: a defect of tspc. What it is about runs
    replicated, with a line in the log, unless `strict=True`."""


class UnsupportedError(TspcError):
    """Something that tspc cannot shard, under `strict=True` or where running replicated would be
    wrong."""


class ShardedParameterError(TspcError, RuntimeError):
    """A sharded parameter used as if it were whole: a stale reference to the whole one, a shard
    that is pickled, a write that would change a part of it."""


class PendingGradientError(TspcError, RuntimeError):
    """A gradient that `no_sync` keeps was used before the last backward of the accumulation."""


class IndexRangeError(TspcError, IndexError):
    """An id or a label that the table has no row for, at any rank; or a sequence longer than a
    table of positions."""


class CacheError(TspcError, OSError):
    """No folder for compiled code can be written."""


class RankMismatchError(TspcError, RuntimeError):
    """Ranks of one axis that disagree: on the graph, the inputs' contents, the optimizer steps
    taken or the gradients held. Raised on all of them before anything is mixed."""


class RankFailureError(TspcError, RuntimeError):
    """Another rank of the axis did not come to a collective within the process group's timeout: it
    ended, hangs, or is elsewhere."""


class NonFiniteError(TspcError, FloatingPointError):
    """`check_nan=True` found an output, parameter or gradient that is not finite, on some rank;
    raised on all of them."""


class ParityError(TspcError, AssertionError):
    """`tspc.verify` found a difference beyond the tolerance."""
