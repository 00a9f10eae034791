"""Layer budgets from measured sensitivity: entries go where a layer's curve says they save most.

A curve tells what compressing one layer alone costs at several ratios. Costs of layers are taken as additive. Each
curve is smoothed, so that other prompts give about the same budgets, and replaced by its lower convex hull, so that the
greedy choice is the best one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import fsum

Curve = Sequence[tuple[float, float]]

# Slopes (nats per full layer of entries) below this are measurement noise: such layers share what is left evenly.
FLAT = 1e-3
# Standard deviation of the smoothing kernel in the logarithm of the ratio: about a factor of two.
BANDWIDTH = 0.75
SMOOTH_POINTS = 160


@dataclass(frozen=True)
class Step:
    """A stretch of one layer's hull: `width` more of its entries save `gain` per entry."""

    layer: int
    width: float
    gain: float


def smoothed(curve: Curve) -> list[tuple[float, float]]:
    """`curve` on a fine grid from its smallest ratio to 1, where its cost is 0.

    Costs fall over orders of magnitude, about by a power of the ratio, so that a line is fitted to log(cost + FLAT)
    over log(ratio) around every point of the grid (local linear regression with a Gaussian kernel).
    """
    knots = [(math.log(ratio), math.log(cost + FLAT)) for ratio, cost in (*curve, (1.0, 0.0))]
    low = min(x for x, _ in knots)
    grid = [low * (1 - place / SMOOTH_POINTS) for place in range(SMOOTH_POINTS)]
    costs = ((math.exp(x), max(0.0, math.exp(_local_line(knots, x)) - FLAT)) for x in grid)
    return [*costs, (1.0, 0.0)]


def _local_line(knots: Sequence[tuple[float, float]], at: float) -> float:
    """Value at `at` of the weighted least-squares line through the knots, the near ones weighing most."""
    weights = [math.exp(-0.5 * ((x - at) / BANDWIDTH) ** 2) for x, _ in knots]
    total = math.fsum(weights)
    mean_x = math.fsum(w * x for w, (x, _) in zip(weights, knots, strict=True)) / total
    mean_y = math.fsum(w * y for w, (_, y) in zip(weights, knots, strict=True)) / total
    spread = math.fsum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, knots, strict=True))
    slope = math.fsum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, knots, strict=True)) / spread
    return mean_y + slope * (at - mean_x)


def along_path(path: Sequence[Sequence[float]], ratio: float) -> tuple[float, ...]:
    """Ratio of entries per layer, with mean `ratio`, between the two nearest allocations of a measured path.

    Args:
        path: ratios per layer by rising mean, the last one all 1.
        ratio: in (0, 1]; below the first mean, layers keep less in proportion.
    """
    means = [fsum(point) / len(point) for point in path]
    after = next((place for place, mean in enumerate(means) if mean >= ratio), len(path) - 1)
    if after == 0:
        return tuple(own * ratio / means[0] for own in path[0])
    part = (ratio - means[after - 1]) / (means[after] - means[after - 1])
    return tuple(low + part * (high - low) for low, high in zip(path[after - 1], path[after], strict=True))


def lower_hull(curve: Curve) -> list[tuple[float, float]]:
    """Points of a curve's lower convex hull; the curve's ratios rise."""
    hull: list[tuple[float, float]] = []
    for point in curve:
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def allocate(curves: Sequence[Curve], ratio: float) -> tuple[float, ...]:
    """Ratio of entries per layer, with mean `ratio`, that the curves say costs least.

    Args:
        curves: per layer, (ratio of entries kept, cost); at least one point below 1 each.
        ratio: in (0, 1].

    Every layer keeps at least the smallest measured ratio; below that total all layers are equal.
    """
    hulls = [_hull(tuple(curve)) for curve in curves]
    floor = max(hull[0][0] for hull in hulls)
    if ratio <= floor:
        return (ratio,) * len(hulls)
    ratios = [floor] * len(hulls)
    spare = (ratio - floor) * len(hulls)
    spare = spend(ratios, (step for step in hull_steps(hulls, floor) if step.gain > FLAT), spare)
    return _level(ratios, spare)


def cheapest(curves: Sequence[Curve], ratio: float) -> tuple[float, ...]:
    """Ratios with mean `ratio` that cost least by the curves' lower hulls, each between the ends of its curve.

    Curves are taken as they are, neither smoothed nor continued; their ends must allow that mean.
    """
    hulls = [lower_hull(curve) for curve in curves]
    ratios = [hull[0][0] for hull in hulls]
    spend(ratios, hull_steps(hulls), ratio * len(hulls) - fsum(ratios))
    return tuple(ratios)


def spend(ratios: list[float], steps: Iterable[Step], spare: float) -> float:
    """Give `spare` to the ratios, step after step; returns what the steps leave over."""
    for step in steps:
        taken = min(step.width, spare)
        ratios[step.layer] += taken
        spare -= taken
    return spare


@lru_cache(maxsize=1024)
def _hull(curve: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
    return lower_hull(smoothed(curve))


def hull_steps(hulls: Sequence[Sequence[tuple[float, float]]], floor: float = 0.0) -> list[Step]:
    """All stretches above the floor, best gain first."""
    steps = [
        Step(layer, right[0] - max(left[0], floor), -_slope(left, right))
        for layer, hull in enumerate(hulls)
        for left, right in pairwise(hull)
        if right[0] > floor
    ]
    return sorted(steps, key=lambda step: -step.gain)


def _level(ratios: list[float], spare: float) -> tuple[float, ...]:
    """Spend `spare` on the layers that have least, so that they rise together."""
    order = sorted(range(len(ratios)), key=lambda layer: ratios[layer])
    for count, layer in enumerate(order, start=1):
        above = ratios[order[count]] if count < len(order) else 1.0
        rise = min(spare, (above - ratios[layer]) * count)
        for raised in order[:count]:
            ratios[raised] += rise / count
        spare -= rise
    return tuple(min(value, 1.0) for value in ratios)
