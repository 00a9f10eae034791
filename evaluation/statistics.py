"""Intervals for means: percentile bootstrap over cases, stratified by task, with a fixed seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri
from scipy.stats import binomtest

RESAMPLES = 10_000
SEED = 0

Interval = tuple[float, float]


def mean_of_groups(groups: Sequence[np.ndarray]) -> float:
    """Mean over groups (tasks) of each group's mean: every task counts alike, whatever its size."""
    return float(np.mean([group.mean() for group in groups]))


def bootstrap_interval(groups: Sequence[np.ndarray], level: float = 0.95) -> Interval:
    """Percentile bootstrap interval of :func:`mean_of_groups`; cases are resampled within their group.

    Args:
        groups: one array ``[n]`` of outcomes or paired differences per task, each with at least one.

    Resampling n values with replacement draws how often each distinct value occurs from a multinomial, so the cost does
    not grow with n for outcomes that are 0 or 1.
    """
    generator = np.random.default_rng(SEED)
    means = np.mean([_resampled_means(group, generator) for group in groups], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """``[RESAMPLES]`` means of resampled `values`."""
    distinct, counts = np.unique(values, return_counts=True)
    drawn = generator.multinomial(len(values), counts / len(values), size=RESAMPLES)
    return drawn @ distinct / len(values)


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a share."""
    z = float(ndtri((1 + level) / 2))
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_interval(groups: Sequence[np.ndarray], level: float = 0.95) -> Interval:
    """Interval of an accuracy: :func:`bootstrap_interval`, or Wilson's over all cases where every outcome is the same.

    Resampling n right answers gives n right answers, an interval without width; Wilson's stays honest there.
    """
    outcomes = np.concatenate(groups)
    if outcomes.min() == outcomes.max():
        return wilson_interval(int(outcomes.sum()), len(outcomes), level)
    return bootstrap_interval(groups, level)


def mcnemar_p(first: np.ndarray, second: np.ndarray) -> float:
    """Exact two-sided McNemar test of paired outcomes 0/1 ``[n]``: p-value of no difference."""
    better, worse = int((first > second).sum()), int((first < second).sum())
    return 1.0 if better + worse == 0 else float(binomtest(better, better + worse).pvalue)
