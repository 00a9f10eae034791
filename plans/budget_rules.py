"""Layer budgets by rule, to compare measured ones with: shares that :func:`scale_budgets` turns into ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

BudgetRule = Literal["uniform", "pyramid", "entropy", "variance"]
BUDGET_RULES: tuple[BudgetRule, ...] = get_args(BudgetRule)
# Rules that follow from a statistic of each layer's attention.
MEASURED_RULES: tuple[BudgetRule, ...] = ("entropy", "variance")
# The last layer of a pyramid keeps this part of the mean.
PYRAMID_BETA = 20


def rule_shares(rule: BudgetRule, statistic: Sequence[float]) -> tuple[float, ...]:
    """Positive share of each layer, mean 1.

    Args:
        rule: ``uniform``; ``pyramid``: falling evenly from first to last layer, the last with 1/20 of the mean
            (PyramidKV); ``entropy``: softmax over layers of the `statistic` (MEDA); ``variance``: softmax of its
            negative (D2O).
        statistic: one number per layer; the other rules only count them.
    """
    layers = len(statistic)
    match rule:
        case "uniform":
            return (1.0,) * layers
        case "pyramid":
            last = 1 / PYRAMID_BETA if layers > 1 else 1.0
            fall = (2 - 2 * last) / max(layers - 1, 1)
            return tuple(2 - last - layer * fall for layer in range(layers))
        case "entropy":
            return _softmax(statistic)
        case "variance":
            return _softmax([-value for value in statistic])


def _softmax(values: Sequence[float]) -> tuple[float, ...]:
    """Softmax times the number of values."""
    weights = [math.exp(value - max(values)) for value in values]
    total = math.fsum(weights)
    return tuple(weight / total * len(values) for weight in weights)
