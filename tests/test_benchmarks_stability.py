"""The stability benchmark: what counts as stable, and a second measurement that starts from nothing."""

from __future__ import annotations

import numpy as np
import pytest

from flowmm.benchmarks.budget_stability import TOTALS, described, remeasured, without_budgets
from flowmm.plans import Plan, resolve_plan
from flowmm.plans.choices import LayerChoice


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.load(resolve_plan("pocket"))


def test_a_second_measurement_starts_from_nothing_but_rho(plan: Plan) -> None:
    planned = plan.layers[2].mode
    choice = LayerChoice(mode="intra" if planned == "cross" else "cross", cost=(1.0, 0.5))
    layers = tuple(
        layer.model_copy(update={"choice": choice, "mode": choice.mode}) if layer.index == 2 else layer
        for layer in plan.layers
    )
    bare = remeasured(plan.model_copy(update={"layers": layers}))
    assert [layer.choice for layer in bare.layers] == [None] * 6
    assert bare.layers[2].mode == planned
    assert (bare.allocations, bare.sensitivity) == (None, None)
    assert {layer.budget for layer in bare.layers} == {plan.method.budget}
    assert bare.layers[2].rho == plan.layers[2].rho


def test_budgets_alone_are_measured_with_the_plans_choices(plan: Plan) -> None:
    bare = without_budgets(plan)
    assert bare.allocations is None
    assert any(layer.choice for layer in bare.layers)
    assert [layer.choice for layer in bare.layers] == [layer.choice for layer in plan.layers]
    assert bare.layer_budgets(0.05) == pytest.approx([0.05] * 6)


def test_stable_is_near_in_shares_or_near_in_score(plan: Plan) -> None:
    noise = np.random.default_rng(0)
    cost = noise.exponential(1.0, (50, 1, len(TOTALS))).repeat(3, axis=1)
    same = described([plan, plan], cost, cost, 0)
    assert same["within_a_tenth_of_each_share"]
    assert same["within_one_standard_error_of_score"]
    assert same["second_minus_first"] == 0
    assert same["budgets_within_one_standard_error_of_score"]
    far = described([plan, remeasured(plan)], cost + np.array([0.0, 1.0, 0.0])[:, None], cost, 0)
    assert not far["within_a_tenth_of_each_share"]
    assert not far["within_one_standard_error_of_score"]
    assert not far["within_one_standard_error_of_difference"]
    assert far["budgets_within_one_standard_error_of_score"], "the choices made it cost more"
    far = described([plan, remeasured(plan)], cost + np.array([0.0, 0.0, 1.0])[:, None], cost, 0)
    assert not far["budgets_within_one_standard_error_of_score"]
