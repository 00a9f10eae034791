"""A plan for a model nobody has profiled: honest about it, and usable."""

from __future__ import annotations

from flowmm.plans.fields import utc_now
from flowmm.plans.fingerprint import ModelFingerprint
from flowmm.plans.layers import LayerPlan
from flowmm.plans.method import MethodParameters
from flowmm.plans.schema import Plan


def unprofiled_plan(
    model: ModelFingerprint,
    *,
    flowmm_version: str,
    method: MethodParameters | None = None,
    created_at: str | None = None,
) -> Plan:
    """A plan without any measurement: every layer decides its mode per prompt, at the same budget."""
    method = method or MethodParameters()
    layers = [
        LayerPlan(index=index, mode="online", budget=method.budget, rho=None) for index in range(model.num_layers)
    ]
    return Plan(
        flowmm_version=flowmm_version,
        created_at=created_at or utc_now(),
        model=model,
        calibration=None,
        method=method,
        layers=tuple(layers),
        environment=None,
        note=(
            f"Nothing was profiled: this plan holds only the architecture of {model.source}. The mode of every layer "
            "is decided per prompt, by comparing a rho measured on that prompt with theta. "
            f"'flowmm profile --model {model.family}' makes a measured plan to replace this one."
        ),
    )
