"""Tspc: a torch.compile backend that trains an unmodified model with folded tensor and sequence
parallelism."""

from tspc.api import Plan, Verification, explain, plan, verify
from tspc.backend import tsp
from tspc.errors import (
    CaptureError,
    NonFiniteError,
    OptionError,
    ParityError,
    PlanError,
    RankFailureError,
    RankMismatchError,
    RuleError,
    ShardedParameterError,
    TspcError,
    UnsupportedError,
)

__all__ = [
    "CaptureError",
    "NonFiniteError",
    "OptionError",
    "ParityError",
    "Plan",
    "PlanError",
    "RankFailureError",
    "RankMismatchError",
    "RuleError",
    "ShardedParameterError",
    "TspcError",
    "UnsupportedError",
    "Verification",
    "explain",
    "plan",
    "tsp",
    "verify",
]
