"""Budgets with all layers compressed at once: steps keep the total, and end where none lowers the cost."""

from __future__ import annotations

from itertools import product
from math import fsum
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import SimulatedPrompts
from tiny_checkpoint import write_checkpoint

import flowmm
from flowmm.models import LoadedModel, load_model
from flowmm.plans import MethodParameters, Plan, unprofiled_plan
from flowmm.plans.allocation import Curve, cheapest
from flowmm.profiler import load_calibration
from flowmm.profiler.joint_budgets import (
    LEAST,
    REACHES,
    STEPS,
    Ratios,
    changed_alone,
    measure_allocations,
    measure_curves,
    suggestions,
    with_allocations,
)
from flowmm.profiler.joint_costs import BUDGETS, Arrangement, JointPrompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"))), dtype="fp32")


@pytest.fixture(scope="module")
def plan(model: LoadedModel) -> Plan:
    method = MethodParameters(merge="evict", proxies="last:4", n_sink=1)
    return unprofiled_plan(model.fingerprint(), flowmm_version=flowmm.__version__, method=method)


@pytest.fixture(scope="module")
def path(model: LoadedModel, plan: Plan) -> tuple[Ratios, ...]:
    prompts = JointPrompts.read(model, plan, load_calibration("pocket", limit=2), protocols=("blind",), hold=True)
    return measure_allocations(prompts, plan)


@st.composite
def curves_and_ratios(draw: st.DrawFn) -> tuple[list[Curve], Ratios]:
    """Any costs at the ratios that would be measured."""
    ratios = tuple(draw(st.lists(st.floats(LEAST, 1.0), min_size=1, max_size=30)))
    costs = st.floats(-1, 1)
    return [
        sorted([(own, 0.0), *((ratio, draw(costs)) for ratio in of)])
        for of, own in zip(changed_alone(ratios), ratios, strict=True)
    ], ratios


@given(curves_and_ratios())
def test_a_suggestion_keeps_the_total_and_stays_within_reach(drawn: tuple[list[Curve], Ratios]) -> None:
    curves, ratios = drawn
    total = fsum(ratios) / len(ratios)
    for after in suggestions(curves, ratios, total):
        assert fsum(after) == pytest.approx(fsum(ratios), rel=1e-9)
        for new, own in zip(after, ratios, strict=True):
            assert max(LEAST, own / REACHES[-1]) - 1e-12 <= new <= min(1, own * REACHES[-1]) + 1e-12


def test_no_other_split_costs_less_by_the_curves() -> None:
    generator = np.random.default_rng(0)
    levels = (0.02, 0.04, 0.06, 0.08, 0.1)
    for _ in range(20):
        # Falling ever more slowly, so that the hulls are the curves.
        drops = -np.sort(-generator.random((3, 4)), axis=1)
        costs = np.concatenate([np.zeros((3, 1)), -drops.cumsum(1)], axis=1)
        curves = [list(zip(levels, of.tolist(), strict=True)) for of in costs]
        found = sum(dict(curve)[round(own, 9)] for curve, own in zip(curves, cheapest(curves, 0.06), strict=True))
        best = min(
            sum(costs[layer][place] for layer, place in enumerate(places))
            for places in product(range(5), repeat=3)
            if sum(places) == 6
        )
        assert found == pytest.approx(best)


def test_a_curve_says_what_one_layer_costs_while_the_others_stay(plan: Plan) -> None:
    prompts: Any = SimulatedPrompts(lambda one: 1 - one.ratios[1] - 0.5 * one.ratios[2])
    ratios = (0.01, 0.1, 0.1, 0.9)
    curves = measure_curves(prompts, Arrangement.planned(plan, 0.2), ratios)
    assert [ratio for ratio, _ in curves[0]] == pytest.approx([LEAST, 0.007, 0.01, 0.014, 0.028])
    assert curves[1] == [pytest.approx((ratio, 0.1 - ratio), abs=1e-9) for ratio in (0.035, 0.07, 0.1, 0.14, 0.28)]
    assert curves[2][-1] == pytest.approx((0.28, -0.09))
    assert curves[3][-1] == (1.0, 0.0)


def test_what_is_not_known_well_counts_as_dear(plan: Plan) -> None:
    prompts: Any = SimulatedPrompts(lambda _: 1.0, noise=0.1)
    curves = measure_curves(prompts, Arrangement.planned(plan, 0.2), (0.1,) * 4)
    rises = [cost for curve in curves for ratio, cost in curve if ratio != 0.1]
    assert np.mean(rises) > 0.01
    assert all((0.1, 0.0) in curve for curve in curves)


def test_layers_that_stand_in_for_each_other_are_not_both_given_up(plan: Plan) -> None:
    """Either layer 1 or layer 2 must keep a tenth; layer 3 wants little, layer 0 nothing."""

    def cost(ratios: Ratios) -> float:
        found = max(ratios[1], 0.8 * ratios[2])
        return max(0.0, 0.15 - found) + max(0.0, 0.02 - ratios[3])

    prompts: Any = SimulatedPrompts(lambda one: cost(one.ratios), noise=0.002)
    path = measure_allocations(prompts, plan)
    assert [round(sum(ratios) / 4, 9) for ratios in path] == [*BUDGETS, 1.0]
    assert cost(BUDGETS[:1] * 4) > 0.09
    assert cost(path[0]) < 0.025


def test_steps_begin_with_the_budgets_of_a_plan_that_was_measured(plan: Plan) -> None:
    start = ((0.005, 0.185, 0.005, 0.005), (0.1, 0.1, 0.1, 0.1), (1.0,) * 4)
    measured = with_allocations(plan, start, ("blind",), 2)
    prompts: Any = SimulatedPrompts(lambda _: 1.0)
    seen: list[tuple[int, int | None]] = []
    found = measure_allocations(prompts, measured, progress=lambda done, total: seen.append((done, total)))
    assert found[0] == pytest.approx(start[0])
    assert found[1] == pytest.approx([2 * ratio for ratio in start[0]]), "each other total follows the one before"
    assert seen[-1] == (STEPS * len(BUDGETS), STEPS * len(BUDGETS))


def test_only_the_totals_asked_for_are_measured(plan: Plan) -> None:
    prompts: Any = SimulatedPrompts(lambda one: max(0.0, 0.2 - one.ratios[1]))
    first, second, *_ = measure_allocations(prompts, plan, BUDGETS[:1])
    assert first[1] > 2 * BUDGETS[0]
    assert second == pytest.approx([2 * ratio for ratio in first])


def test_totals_are_met_on_real_prompts(path: tuple[Ratios, ...]) -> None:
    assert [round(sum(ratios) / len(ratios), 9) for ratios in path] == [*BUDGETS, 1.0]


def test_a_plan_follows_its_allocations_at_any_total(plan: Plan, path: tuple[Ratios, ...]) -> None:
    made = with_allocations(plan, path, ("blind",), 1)
    assert Plan.loads(made.dumps()) == made
    for total in (0.003, 0.02, 0.2, 0.37, 0.9, 1.0):
        ratios = made.layer_budgets(total)
        assert sum(ratios) / len(ratios) == pytest.approx(total, rel=1e-4)
    for ratios in path:
        assert made.layer_budgets(sum(ratios) / len(ratios)) == pytest.approx(ratios, abs=1e-5)
    below, smallest = made.layer_budgets(0.01), made.layer_budgets(BUDGETS[0])
    assert below == pytest.approx([ratio / 5 for ratio in smallest], abs=1e-6), "less, but shared out alike"
