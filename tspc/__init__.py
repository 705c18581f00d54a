"""A torch.compile backend that trains an unmodified model with folded tensor and sequence
parallelism."""

from tspc.api import Plan, Verification, explain, plan, verify
from tspc.backend import tsp
from tspc.brute import check_rule
from tspc.errors import (
    CacheError,
    CaptureError,
    IndexRangeError,
    NonFiniteError,
    OptionError,
    ParityError,
    PendingGradientError,
    PlanError,
    RankFailureError,
    RankMismatchError,
    RuleError,
    ShardedParameterError,
    TspcError,
    UnsupportedError,
)
from tspc.registry import rule
from tspc.runtime.accumulate import no_sync
from tspc.runtime.reading import load_safetensors
from tspc.runtime.whole import full_state_dict, load_full_state_dict
from tspc.version import __version__ as __version__

__all__ = [
    "CacheError",
    "CaptureError",
    "IndexRangeError",
    "NonFiniteError",
    "OptionError",
    "ParityError",
    "PendingGradientError",
    "Plan",
    "PlanError",
    "RankFailureError",
    "RankMismatchError",
    "RuleError",
    "ShardedParameterError",
    "TspcError",
    "UnsupportedError",
    "Verification",
    "check_rule",
    "explain",
    "full_state_dict",
    "load_full_state_dict",
    "load_safetensors",
    "no_sync",
    "plan",
    "rule",
    "tsp",
    "verify",
]
