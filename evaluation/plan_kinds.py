"""Kinds of plan that a study compares methods under, all made from one measured plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flowmm.errors import InputError
from flowmm.plans import Plan
from flowmm.plans.layers import decide_mode
from flowmm.plans.method import FlowKind

FLOW_KINDS: tuple[FlowKind, ...] = ("raw", "nosink", "nosink_auto", "balanced", "lift", "v2t", "t2v")


def measured(plan: Plan) -> Plan:
    """The plan as it is: its modes, and its layers' curves where it holds them."""
    return plan


def uniform(plan: Plan) -> Plan:
    """The same modes; every layer keeps the same number of entries."""
    return _changed(plan, plan.method.rho_kind, online=False)


def online(plan: Plan) -> Plan:
    """Uniform budgets; every layer decides its mode per prompt, so that a method's theta takes effect."""
    return _changed(plan, "raw", online=True)


def by_flow(kind: FlowKind, plan: Plan) -> Plan:
    """Uniform budgets; modes from the estimator `kind` at the plan's theta (lift: at chance level)."""
    return _changed(plan, kind, online=False)


PLAN_KINDS: dict[str, Callable[[Plan], Plan]] = {
    "uniform": uniform,
    "measured": measured,
    "online": online,
    **{f"by_{kind}": partial(by_flow, kind) for kind in FLOW_KINDS},
}


def plan_of_kind(kind: str, plan: Plan) -> Plan:
    """`plan` turned into one of :data:`PLAN_KINDS`.

    Raises:
        InputError: no such kind.
    """
    if kind not in PLAN_KINDS:
        raise InputError(f"kind of plan {kind!r}: expected one of {', '.join(PLAN_KINDS)}")
    return PLAN_KINDS[kind](plan)


def _changed(plan: Plan, kind: FlowKind, online: bool) -> Plan:
    method = plan.method.model_copy(update={"rho_kind": kind})
    layers = []
    for layer in plan.layers:
        flow = layer.flow(kind)
        mode = layer.mode if flow is None else decide_mode(flow, method.threshold)
        changes = {"mode": "online" if online else mode, "curve": None, "budget": method.budget}
        changes |= {"forced": False, "choice": None}
        layers.append(layer.model_copy(update=changes))
    return Plan.loads(
        plan.model_copy(
            update={
                "method": method,
                "layers": tuple(layers),
                "sensitivity": None,
                "allocations": None,
                "budget_rule": None,
            }
        ).dumps()
    )
