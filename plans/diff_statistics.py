"""Is a change more than chance? Student's t over prompts, corrected for the number of layers by Holm's method.

In plain Python, because a plan's own numbers (mean, std, n) are all it needs: comparing two plans imports no numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_FRACTION_STEPS = 500
_PRECISION = 1e-14
# Stands for zero where the continued fraction would divide by it.
_TINY = 1e-300


@dataclass(frozen=True)
class Moments:
    """Mean, standard deviation (with n - 1) and number of values over prompts."""

    mean: float
    std: float
    n: int


def paired_p(differences: Moments) -> float | None:
    """Two-sided p of "no change" from each prompt's new minus old value; None for fewer than two prompts."""
    if differences.n < 2:
        return None
    return _p(differences.mean, differences.std / math.sqrt(differences.n), differences.n - 1)


def welch_p(old: Moments, new: Moments) -> float | None:
    """Two-sided p of "same mean" for different prompts (Welch's test); None if a side has fewer than two.

    Degrees of freedom after Welch and Satterthwaite.
    """
    if min(old.n, new.n) < 2:
        return None
    a, b = old.std**2 / old.n, new.std**2 / new.n
    spread = a**2 / (old.n - 1) + b**2 / (new.n - 1)
    freedom = (a + b) ** 2 / spread if spread > 0 else old.n + new.n - 2
    return _p(new.mean - old.mean, math.sqrt(a + b), freedom)


def margin_p(margin: float, n: int) -> float | None:
    """Two-sided p of "on the threshold" for a mean that lies `margin` standard deviations off; None for n < 2."""
    return None if n < 2 else student_p(margin * math.sqrt(n), n - 1)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values: those at most alpha are the changes found at a family-wise error rate of alpha.

    Holm's step-down method, valid however the tests depend on each other. None stays None and is not counted.
    """
    order = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[place] = largest
    return adjusted


def _p(difference: float, error: float, freedom: float) -> float:
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return student_p(difference / error, freedom)


def student_p(t: float, freedom: float) -> float:
    """P(|T| >= |t|) for Student's t with `freedom` > 0 degrees of freedom (DLMF 8.17.1: I_x(freedom/2, 1/2))."""
    x = freedom / (freedom + t * t)
    return _incomplete_beta(x, freedom / 2, 0.5)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularized incomplete beta function I_x(a, b) (DLMF 8.17.22: continued fraction)."""
    if x <= 0 or x >= 1:
        return min(max(x, 0.0), 1.0)
    # The fraction converges fast only below the mean.
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / (a * _fraction(x, a, b))


def _fraction(x: float, a: float, b: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)), evaluated forwards by the modified Lentz method."""
    value, numerator, denominator = 1.0, 1.0, 0.0
    for step in range(1, _FRACTION_STEPS):
        m = step // 2
        if step % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        numerator = 1 + d / numerator or _TINY
        denominator = 1 / (1 + d * denominator or _TINY)
        value *= numerator * denominator
        if abs(numerator * denominator - 1) < _PRECISION:
            break
    return value
