"""Layer budgets from sensitivity curves: exact totals, the best convex split, stable where nothing matters."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmm.plans.allocation import FLAT, allocate, lower_hull, smoothed

GRID = (0.02, 0.05, 0.1, 0.2, 0.4)

curve = st.lists(st.floats(0, 8), min_size=len(GRID), max_size=len(GRID)).map(
    lambda costs: list(zip(GRID, costs, strict=True))
)


def cost_at(hull: list[tuple[float, float]], ratio: float) -> float:
    for left, right in itertools.pairwise(hull):
        if left[0] <= ratio <= right[0]:
            return left[1] + (right[1] - left[1]) * (ratio - left[0]) / (right[0] - left[0])
    raise AssertionError(ratio)


@settings(max_examples=80, deadline=None)
@given(curves=st.lists(curve, min_size=1, max_size=6), ratio=st.floats(0.001, 1.0))
def test_total_is_exact_and_ratios_are_possible(curves: list[list[tuple[float, float]]], ratio: float) -> None:
    ratios = allocate(curves, ratio)
    assert sum(ratios) == pytest.approx(ratio * len(curves), rel=1e-9)
    assert all(0 < value <= 1 + 1e-12 for value in ratios)


@settings(max_examples=40, deadline=None)
@given(curves=st.lists(curve, min_size=2, max_size=3), ratio=st.floats(0.03, 0.9))
def test_no_exchange_between_layers_is_better(curves: list[list[tuple[float, float]]], ratio: float) -> None:
    hulls = [lower_hull(smoothed(points)) for points in curves]
    ratios = list(allocate(curves, ratio))
    best = sum(cost_at(hull, min(value, 1.0)) for hull, value in zip(hulls, ratios, strict=True))
    for giver, taker in itertools.permutations(range(len(curves)), 2):
        for moved in (0.01, 0.05):
            other = list(ratios)
            other[giver] -= moved
            other[taker] += moved
            if other[giver] >= GRID[0] and other[taker] <= 1:
                total = sum(cost_at(hull, value) for hull, value in zip(hulls, other, strict=True))
                assert total >= best - 2e-3, "better by more than the noise floor"


def test_the_layer_that_matters_gets_the_entries() -> None:
    flat = [(ratio, 0.0) for ratio in GRID]
    steep = [(0.02, 2.7), (0.05, 2.6), (0.1, 2.4), (0.2, 1.6), (0.4, 0.01)]
    ratios = allocate([flat, steep, flat, flat], 0.1)
    assert ratios[1] > 0.3
    assert ratios[0] == ratios[2] == ratios[3] == pytest.approx(0.02, abs=0.005)
    assert allocate([flat] * 4, 0.3) == pytest.approx([0.3] * 4)
    assert allocate([steep] * 4, 0.01) == pytest.approx([0.01] * 4)


def test_smoothing_keeps_a_power_law_and_its_ends() -> None:
    """cost + FLAT falling by a power of the ratio is a line, which local lines reproduce exactly."""
    power = -math.log(FLAT) / -math.log(GRID[0])
    points = smoothed([(ratio, FLAT * ratio**-power - FLAT) for ratio in GRID])
    assert points[0][0] == pytest.approx(GRID[0])
    assert points[-1] == (1.0, 0.0)
    assert all(cost == pytest.approx(FLAT * ratio**-power - FLAT, rel=1e-6, abs=1e-9) for ratio, cost in points)


def test_smoothing_evens_out_noise_in_budgets() -> None:
    """Curves of the same layers with 20 % noise: smoothed, their budgets lie closer together."""
    noise, truth = random.Random(0), [[scale * ratio**-1.2 for ratio in GRID] for scale in (0.01, 0.005, 0.0025)]

    def noisy() -> list[list[tuple[float, float]]]:
        return [
            [(ratio, cost * math.exp(noise.gauss(0, 0.2))) for ratio, cost in zip(GRID, costs, strict=True)]
            for costs in truth
        ]

    exact = allocate([list(zip(GRID, costs, strict=True)) for costs in truth], 0.1)
    for _ in range(20):
        assert allocate(noisy(), 0.1) == pytest.approx(exact, rel=0.3)


def test_hull_is_convex_and_below_the_curve() -> None:
    points = [(0.02, 2.0), (0.05, 2.5), (0.1, 0.5), (0.2, 0.6), (0.4, 0.1), (1.0, 0.0)]
    assert lower_hull(points) == [(0.02, 2.0), (0.1, 0.5), (0.4, 0.1), (1.0, 0.0)]
