"""A torch.compile backend that trains an unmodified model with folded tensor and sequence
parallelism."""

from tspc.api import Plan, explain, plan
from tspc.backend.brute import check_rule
from tspc.backend.dry import DryRun
from tspc.backend.tsp import tsp
from tspc.base.errors import (
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
from tspc.base.version import __version__ as __version__
from tspc.factors.registry import rule
from tspc.parity import Verification, verify
from tspc.runtime.params.accumulate import no_sync
from tspc.runtime.params.reading import load_safetensors
from tspc.runtime.params.whole import full_state_dict, load_full_state_dict

__all__ = [
    "CacheError",
    "CaptureError",
    "DryRun",
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
