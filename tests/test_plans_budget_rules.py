"""Layer budgets by rule: exact totals whatever the rule, and the formulas of their papers."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowmm.plans import scale_budgets
from flowmm.plans.allocation import allocate
from flowmm.plans.budget_rules import BUDGET_RULES, BudgetRule, rule_shares
from flowmm.runtime.budgets import entry_budget, layer_entries, planned_entries

statistics = st.lists(st.floats(0, 12), min_size=1, max_size=40)
ratios = st.floats(0.001, 1.0)
lengths = st.integers(1, 5000)


@settings(max_examples=200, deadline=None)
@given(rule=st.sampled_from(BUDGET_RULES), statistic=statistics, ratio=ratios, length=lengths)
@example(rule="entropy", statistic=[0.0, 0.0, 2.0], ratio=0.5, length=2)
def test_every_rule_keeps_exactly_the_asked_entries(
    rule: BudgetRule, statistic: list[float], ratio: float, length: int
) -> None:
    shares = rule_shares(rule, statistic)
    assert math.fsum(shares) == pytest.approx(len(statistic))
    entries = planned_entries(lambda asked: scale_budgets(shares, asked), ratio)(length)
    assert sum(entries) == len(statistic) * entry_budget(length, ratio)
    assert all(1 <= kept <= length for kept in entries)


@settings(max_examples=100, deadline=None)
@given(
    costs=st.lists(st.lists(st.floats(0, 8), min_size=4, max_size=4), min_size=1, max_size=12),
    budget=st.one_of(ratios, st.integers(1, 400)),
    length=lengths,
)
def test_measured_budgets_keep_exactly_the_asked_entries(costs: list[list[float]], budget: float, length: int) -> None:
    curves = [list(zip((0.005, 0.02, 0.1, 0.4), layer, strict=True)) for layer in costs]
    entries = planned_entries(lambda asked: allocate(curves, asked), budget)(length)
    assert sum(entries) == len(costs) * entry_budget(length, budget)
    assert all(1 <= kept <= length for kept in entries)


def test_pyramid_falls_evenly_to_a_twentieth() -> None:
    shares = rule_shares("pyramid", [0.0] * 4)
    steps = [before - after for before, after in itertools.pairwise(shares)]
    assert steps == pytest.approx([steps[0]] * 3)
    assert shares[-1] == pytest.approx(1 / 20)
    # KVCache-Factory's integers for capacity 136, window 8, beta 20 (without the window), up to its rounding.
    assert layer_entries(shares, 1000, 128) == pytest.approx([250, 169, 88, 7], abs=2)
    assert rule_shares("pyramid", [0.0]) == (1.0,)


def test_softmax_rules_follow_their_papers() -> None:
    """Numbers of the method notes: D2O's layer budgets, MEDA's."""
    d2o = scale_budgets(rule_shares("variance", [0.1, 0.4, 0.8, 0.2]), 0.2)
    assert d2o == pytest.approx((0.25459537, 0.18860889, 0.12642832, 0.23036742), abs=1e-8)
    meda = scale_budgets(rule_shares("entropy", [0.9743147528693494, 0.4, 0.2]), 0.2)
    assert meda == pytest.approx((0.29642655, 0.166915, 0.13665845), abs=1e-8)
