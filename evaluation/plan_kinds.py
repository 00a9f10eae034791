"""Kinds of plan that a study compares methods under, all made from one measured plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flowmm.errors import InputError
from flowmm.plans import MethodParameters, Plan
from flowmm.plans.choices import LayerChoice, same_algorithm
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


# Choices that a change of the field on the left makes meaningless, beside one of the field itself.
_DECIDED_BY = {"gate": {"tau"}, "selector": {"first_share"}, "theta": {"mode"}}


def followed_by(parameters: MethodParameters, plan: Plan) -> Plan:
    """`plan` for a control: a change to the plan's own preset keeps the layers' choices but for what it changes.

    A run with other parameters than the plan's follows no choices. A control must differ from the method in one thing
    alone, so it does.
    """
    own = plan.method
    if parameters.preset is None or parameters.preset != own.preset or same_algorithm(parameters, own):
        return plan
    changed = {name for name, value in parameters if value != getattr(own, name)}
    lost = changed.union(*(_DECIDED_BY.get(name, set()) for name in changed))
    layers = [layer.model_copy(update={"choice": _without(layer.choice, lost)}) for layer in plan.layers]
    method = parameters.model_copy(update={"budget": own.budget})
    return plan.model_copy(update={"method": method, "layers": tuple(layers)})


def _without(choice: LayerChoice | None, lost: set[str]) -> LayerChoice | None:
    kept = {} if choice is None else {name: value for name, value in choice.changes.items() if name not in lost}
    return LayerChoice(**kept, cost=choice.cost) if choice is not None and kept else None


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
