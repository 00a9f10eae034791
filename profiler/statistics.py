"""From per-prompt flow to what a plan stores: statistics of every estimator and the mode of every layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
import pyarrow as pa

from flowmm.errors import InputError
from flowmm.plans import (
    FlowEstimates,
    FlowKind,
    LayerPlan,
    MethodParameters,
    RhoStatistics,
    SinkStatistics,
    TokenStatistics,
    decide_mode,
)
from flowmm.profiler.bootstrap import mean_intervals

KINDS: tuple[FlowKind, ...] = get_args(FlowKind)
_PER_HEAD: dict[FlowKind, str] = {
    "raw": "rho",
    "nosink": "rho_nosink",
    "nosink_auto": "rho_nosink_auto",
    "v2t": "text_mass_of_visual",
    "t2v": "visual_mass_of_text",
}
OTHERS: tuple[FlowKind, ...] = ("nosink", "nosink_auto", "balanced", "v2t", "t2v")
_PER_PROMPT = ("tokens", "visual_tokens", "images", "uniform_rho")


@dataclass(frozen=True)
class EstimatorStatistics:
    """One estimator of one layer over prompts.

    Shares of attention in [0, 1], except for ``lift`` (rho over rho of uniform causal attention, no unit), whose `n`
    counts the prompts with both modalities. `ci95` is None for n = 1, `margin` (``|mean - threshold| / std``) for
    std 0. `agree` is the share of prompts on the same side of the threshold as their mean.
    """

    mean: float
    std: float
    q05: float
    q50: float
    q95: float
    n: int
    ci95: tuple[float, float] | None
    margin: float | None
    agree: float


@dataclass(frozen=True)
class Measurements:
    """Per-prompt numbers of a profile, in sample order; all that its statistics need.

    Attributes:
        flows: ``[prompts, layers]`` fp64 per estimator, mean over heads; lift is NaN where chance level is 0.
        sinks: ``[prompts, layers, 2]`` fp64: mass on sink columns, number of sink columns.
        prompts: ``[prompts]`` each: tokens, visual_tokens, images, uniform_rho.
    """

    flows: dict[FlowKind, np.ndarray]
    sinks: np.ndarray
    prompts: dict[str, np.ndarray]

    @classmethod
    def from_tables(cls, tables: Iterable[pa.Table]) -> Measurements:
        """From record tables (:mod:`flowmm.profiler.records`) with whole prompts in sample order, one at a time."""
        parts = [_measured(table) for table in tables]
        return cls(
            {kind: np.concatenate([part.flows[kind] for part in parts]) for kind in KINDS},
            np.concatenate([part.sinks for part in parts]),
            {name: np.concatenate([part.prompts[name] for part in parts]) for name in _PER_PROMPT},
        )

    @cached_property
    def has_flow(self) -> np.ndarray:
        """``[prompts]`` bool: the prompt holds both modalities where attention can cross them."""
        return self.prompts["uniform_rho"] > 0


def _measured(table: pa.Table) -> Measurements:
    layers = int(table["layer"].to_numpy().max()) + 1
    flows: dict[FlowKind, np.ndarray] = {
        kind: _mean_over_heads(table[column]).reshape(-1, layers) for kind, column in _PER_HEAD.items()
    }
    prompts = {name: table[name].to_numpy()[::layers] for name in _PER_PROMPT}
    flows["balanced"] = (flows["v2t"] + flows["t2v"]) / 2
    chance = prompts["uniform_rho"][:, None]
    flows["lift"] = np.divide(flows["raw"], chance, out=np.full_like(flows["raw"], np.nan), where=chance > 0)
    masses = table["sink_column_masses"].to_pylist()
    sinks = np.array([(sum(columns), len(columns)) for columns in masses], dtype=np.float64)
    return Measurements(flows, sinks.reshape(-1, layers, 2), prompts)


def _mean_over_heads(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), -1).mean(1)


def estimator_statistics(
    measured: Measurements, kind: FlowKind, theta: float, seed: int = 0
) -> list[EstimatorStatistics]:
    """Statistics of one estimator for every layer; lift is compared with 1, the others with `theta`.

    Raises:
        InputError: lift, and no prompt holds both modalities.
    """
    values = measured.flows[kind]
    if kind == "lift":
        values = values[measured.has_flow]
    if len(values) == 0:
        raise InputError(
            "no calibration prompt holds both text and images in its attention, so no flow can be measured; "
            "add prompts with images"
        )
    ends = mean_intervals(values, seed).T if len(values) > 1 else [None] * values.shape[1]
    threshold = 1.0 if kind == "lift" else theta
    return [_statistics(values[:, layer], ends[layer], threshold) for layer in range(values.shape[1])]


def _statistics(values: np.ndarray, ends: np.ndarray | None, threshold: float) -> EstimatorStatistics:
    n, mean = len(values), float(values.mean())
    std = float(values.std(ddof=1)) if n > 1 else 0.0
    mode = decide_mode(mean, threshold)
    q05, q50, q95 = (float(value) for value in np.quantile(values, [0.05, 0.5, 0.95]))
    return EstimatorStatistics(
        mean=mean,
        std=std,
        q05=q05,
        q50=q50,
        q95=q95,
        n=n,
        ci95=None if ends is None else (float(ends[0]), float(ends[1])),
        margin=abs(mean - threshold) / std if std > 0 else None,
        agree=float(np.mean([decide_mode(float(value), threshold) == mode for value in values])),
    )


def half_widths(measured: np.ndarray, seed: int) -> np.ndarray:
    """``[layers]``: half the 95 % interval of each column of ``[prompts, layers]``; infinite below two prompts."""
    if len(measured) < 2:
        return np.full(measured.shape[1], np.inf)
    low, high = mean_intervals(measured, seed)
    return (high - low) / 2


def plan_layers(measured: Measurements, method: MethodParameters, seed: int = 0) -> tuple[LayerPlan, ...]:
    """One plan row per layer: mode by ``rho > theta`` (eq. 7) for the estimator ``method.rho_kind``, equal budgets.

    Raises:
        InputError: no prompt holds both modalities, so rho says nothing about the model.
    """
    by_kind = {kind: estimator_statistics(measured, kind, method.theta, seed) for kind in KINDS}
    sinks = measured.sinks.mean(0)
    return tuple(
        LayerPlan(
            index=index,
            mode=decide_mode(by_kind[method.rho_kind][index].mean, method.threshold),
            budget=method.budget,
            rho=_rho_statistics(by_kind["raw"][index], by_kind["lift"][index], by_kind[method.rho_kind][index]),
            estimates=FlowEstimates(**{kind: _estimate(by_kind[kind][index]) for kind in OTHERS}),
            sinks=SinkStatistics(mass=float(mass), count=float(count)),
        )
        for index, (mass, count) in enumerate(sinks)
    )


def _rho_statistics(
    raw: EstimatorStatistics, lift: EstimatorStatistics, deciding: EstimatorStatistics
) -> RhoStatistics:
    return RhoStatistics(
        mean=_share(raw.mean),
        std=raw.std,
        q05=_share(raw.q05),
        q50=_share(raw.q50),
        q95=_share(raw.q95),
        n=raw.n,
        lift_mean=lift.mean,
        lift_std=lift.std,
        margin=deciding.margin,
        agree=deciding.agree,
        ci95=raw.ci95,
        lift_ci95=lift.ci95,
    )


def _estimate(statistics: EstimatorStatistics) -> tuple[float, float | None, float | None]:
    low, high = statistics.ci95 or (None, None)
    return (_share(statistics.mean), low if low is None else _share(low), high if high is None else _share(high))


def _share(value: float) -> float:
    """fp32 masses sum to 1 within rounding only."""
    return min(max(value, 0.0), 1.0)


def token_statistics(measured: Measurements) -> TokenStatistics:
    """What the calibration prompts look like."""
    tokens = measured.prompts["tokens"]
    return TokenStatistics(
        total_mean=float(tokens.mean()),
        total_min=int(tokens.min()),
        total_max=int(tokens.max()),
        visual_share_mean=float((measured.prompts["visual_tokens"] / tokens).mean()),
        images_mean=float(measured.prompts["images"].mean()),
    )
