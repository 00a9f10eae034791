"""Budgets with all layers compressed at once: transfers keep the total, and end where none lowers the cost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import SimulatedPrompts
from tiny_checkpoint import write_checkpoint

import flowmm
from flowmm.models import LoadedModel, load_model
from flowmm.plans import MethodParameters, Plan, unprofiled_plan
from flowmm.profiler import load_calibration
from flowmm.profiler.joint_budgets import LEAST, RACES, Ratios, measure_allocations, transfers, with_allocations
from flowmm.profiler.joint_costs import BUDGETS, JointPrompts


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


@given(st.lists(st.floats(LEAST, 1.0), min_size=1, max_size=30))
def test_a_transfer_keeps_the_total_and_stays_between_its_bounds(ratios: list[float]) -> None:
    for after in transfers(tuple(ratios), 0.05):
        assert sum(after) == pytest.approx(sum(ratios), rel=1e-9)
        assert max(after) <= 1
        assert min(after) >= LEAST - 1e-12
        assert after != tuple(ratios)


def test_entries_move_between_blocks_and_inside_them() -> None:
    changed = [{layer for layer, ratio in enumerate(after) if ratio != 0.2} for after in transfers((0.2,) * 28, 0.2)]
    assert {*range(9)} in changed, "from one block of four and five layers to the next"
    assert {*range(4)} in changed, "inside the first block"
    assert {*range(28)} in changed, "from some blocks to all others"


def test_the_layers_that_keep_least_give_together() -> None:
    found = transfers((0.03, 0.13, 0.08, 0.025, 0.015, 0.02), 0.05)
    expected = [0.03, 0.175, 0.08, LEAST, LEAST, LEAST]
    assert any(after == pytest.approx(expected) for after in found)
    assert len(set(found)) == len(found)


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


def test_transfers_begin_with_the_budgets_of_a_plan_that_was_measured(plan: Plan) -> None:
    start = ((0.005, 0.185, 0.005, 0.005), (0.1, 0.1, 0.1, 0.1), (1.0,) * 4)
    measured = with_allocations(plan, start, ("blind",), 2)
    prompts: Any = SimulatedPrompts(lambda _: 1.0)
    seen: list[tuple[int, int | None]] = []
    found = measure_allocations(prompts, measured, progress=lambda done, total: seen.append((done, total)))
    assert found[0] == pytest.approx(start[0])
    assert found[1] == pytest.approx([2 * ratio for ratio in start[0]]), "each other total follows the one before"
    assert seen[-1] == (RACES * len(BUDGETS), RACES * len(BUDGETS))


def test_only_the_totals_asked_for_are_raced(plan: Plan) -> None:
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
