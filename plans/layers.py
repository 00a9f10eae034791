"""One layer of a plan: what was measured, and what its cache shall become."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flowmm.errors import BudgetError
from flowmm.plans.choices import LayerChoice
from flowmm.plans.fields import Count, Index, NonNegative, Ratio, Record, Share, rounded
from flowmm.plans.method import FlowKind

Mode = Literal["cross", "intra", "online"]
Interval = tuple[NonNegative, NonNegative]
# Ratio of entries kept, and what that costs in nats.
CurvePoint = tuple[Ratio, NonNegative]
# Mean over prompts, then the ends of its 95 % interval; no ends for a single prompt.
Estimate = tuple[Share, Share | None, Share | None]


class RhoStatistics(Record):
    """Cross-modal share of a layer's attention (eq. 6-7) over calibration prompts.

    `mean` and the quantiles are shares in [0, 1]; `std` is 0 for n = 1. `lift` is rho over rho of uniform causal
    attention. `margin` is the distance of the deciding estimate from its threshold over its std, null for std 0.
    `agree` is the share of prompts whose own mode is the layer's. `ci95` and `lift_ci95` are bootstrap intervals of the
    means over prompts.
    """

    mean: Share
    std: NonNegative
    q05: Share
    q50: Share
    q95: Share
    n: Count
    lift_mean: NonNegative | None
    lift_std: NonNegative | None
    margin: NonNegative | None
    agree: Share | None
    ci95: Interval | None = None
    lift_ci95: Interval | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.q05 <= self.q50 <= self.q95:
            raise ValueError("quantiles must not decrease from q05 to q95")
        for interval in (self.ci95, self.lift_ci95):
            if interval is not None and interval[0] > interval[1]:
                raise ValueError("an interval must not start above its end")
        return self


class FlowEstimates(Record):
    """The other estimators of the same attention, each as mean and 95 % interval over prompts.

    `nosink` leaves out the first text tokens (at most 4 before the first image), `nosink_auto` the columns that
    draw more than a tenth of the attention; `v2t` is the mass that visual rows put on text, `t2v` that of text rows
    on images, `balanced` the mean of both.
    """

    nosink: Estimate
    nosink_auto: Estimate
    balanced: Estimate
    v2t: Estimate
    t2v: Estimate


class SinkStatistics(Record):
    """Attention sinks, columns with more than a tenth of all attention: their mass and number, means over prompts."""

    mass: Share
    count: NonNegative


class LayerPlan(Record):
    """Mode and budget of one decoder layer.

    `budget` is the ratio of the prompt's entries kept when a run asks for the plan's own total. `forced` marks a mode
    that a person chose against, or without, a measured rho. `curve` is what compressing this layer alone costs: (ratio
    of entries kept, next-token KL against the full cache in nats), by rising ratio below 1. `choice` holds parameters
    that were measured to cost less in this layer than the method's.
    """

    index: Index
    mode: Mode
    forced: bool = False
    budget: Ratio
    rho: RhoStatistics | None
    estimates: FlowEstimates | None = None
    sinks: SinkStatistics | None = None
    curve: Annotated[tuple[CurvePoint, ...], Field(min_length=1, max_length=64)] | None = None
    choice: LayerChoice | None = None

    @model_validator(mode="after")
    def _rising(self) -> Self:
        ratios = [ratio for ratio, _ in self.curve or ()]
        if ratios != sorted(set(ratios)) or 1.0 in ratios:
            raise ValueError("the ratios of a curve must rise and stay below 1")
        return self

    @model_validator(mode="after")
    def _mode_chosen(self) -> Self:
        if self.choice is not None and self.choice.mode not in (None, self.mode):
            raise ValueError("choice.mode must be the layer's mode")
        return self

    @property
    def mode_was_measured(self) -> bool:
        """Whether the mode is the one that cost less, whatever rho says."""
        return self.choice is not None and self.choice.mode is not None

    def flow(self, kind: FlowKind) -> float | None:
        """Mean over prompts of the estimator `kind` (``method.rho_kind``); None where the plan does not hold it."""
        if kind == "raw":
            return None if self.rho is None else self.rho.mean
        if kind == "lift":
            return None if self.rho is None else self.rho.lift_mean
        return None if self.estimates is None else getattr(self.estimates, kind)[0]


def decide_mode(flow: float, threshold: float) -> Literal["cross", "intra"]:
    """Cross-modal above the threshold, strictly (eq. 7), at the precision a plan stores."""
    return "cross" if rounded(flow) > rounded(threshold) else "intra"


def scale_budgets(shares: Sequence[float], ratio: float) -> tuple[float, ...]:
    """Ratios in (0, 1] with mean `ratio`, proportional to `shares` except where a layer is full.

    A layer that would pass 1 keeps everything and the others share what is left. Equal shares give exactly `ratio`.

    Raises:
        BudgetError: `ratio` is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise BudgetError(f"budget {ratio}: expected a ratio in (0, 1]")
    n = len(shares)
    if min(shares) == max(shares) or ratio == 1:
        return (float(ratio),) * n
    # Largest first: once one layer stays below 1, all smaller ones do, with the same factor.
    order = sorted(range(n), key=lambda layer: -shares[layer])
    ratios = [1.0] * n
    for full, layer in enumerate(order):
        factor = (ratio * n - full) / math.fsum(shares[other] for other in order[full:])
        if factor * shares[layer] <= 1:
            for other in order[full:]:
                ratios[other] = factor * shares[other]
            break
    return tuple(ratios)
