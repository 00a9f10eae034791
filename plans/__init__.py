"""What a plan is: the format of ``FORMAT.md`` in code. Imports nothing heavy, nothing of flowmm but its errors."""

from flowmm.plans.diff import Change, PlanDiff, diff
from flowmm.plans.fields import source_name, utc_now
from flowmm.plans.fingerprint import (
    CalibrationFingerprint,
    Environment,
    Mismatch,
    ModelFingerprint,
    SensitivityFingerprint,
    TokenStatistics,
)
from flowmm.plans.layers import (
    FlowEstimates,
    LayerPlan,
    Mode,
    RhoStatistics,
    SinkStatistics,
    decide_mode,
    scale_budgets,
)
from flowmm.plans.method import PRESETS, FlowKind, MethodParameters
from flowmm.plans.schema import Plan
from flowmm.plans.shipped import resolve_plan, shipped_names
from flowmm.plans.unprofiled import unprofiled_plan

__all__ = [
    "PRESETS",
    "CalibrationFingerprint",
    "Change",
    "Environment",
    "FlowEstimates",
    "FlowKind",
    "LayerPlan",
    "MethodParameters",
    "Mismatch",
    "Mode",
    "ModelFingerprint",
    "Plan",
    "PlanDiff",
    "RhoStatistics",
    "SensitivityFingerprint",
    "SinkStatistics",
    "TokenStatistics",
    "decide_mode",
    "diff",
    "resolve_plan",
    "scale_budgets",
    "shipped_names",
    "source_name",
    "unprofiled_plan",
    "utc_now",
]
