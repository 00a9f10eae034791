"""From per-prompt flow to what a plan stores: rho statistics and the mode of every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowmm.errors import InputError
from flowmm.plans import LayerPlan, RhoStatistics, TokenStatistics, decide_mode
from flowmm.profiler.recorder import PromptFlow


def layer_rho(flows: Sequence[PromptFlow]) -> np.ndarray:
    """``[prompts, layers]`` fp64: eq. 6-7, mean over heads."""
    return np.array([[np.mean(layer.rho) for layer in flow.layers] for flow in flows])


def rho_statistics(rho: np.ndarray, uniform: np.ndarray, theta: float) -> RhoStatistics:
    """Statistics of one layer.

    Args:
        rho: ``[prompts]`` fp64.
        uniform: ``[prompts]`` fp64, chance level of each prompt; prompts with chance level 0 have no lift.
        theta: threshold of the mode.
    """
    n, mean = len(rho), float(rho.mean())
    std = float(rho.std(ddof=1)) if n > 1 else 0.0
    lift = rho[uniform > 0] / uniform[uniform > 0]
    mode = decide_mode(mean, theta)
    agree = np.mean([decide_mode(float(value), theta) == mode for value in rho])
    q05, q50, q95 = (float(value) for value in np.quantile(rho, [0.05, 0.5, 0.95]))
    return RhoStatistics(
        mean=mean,
        std=std,
        q05=q05,
        q50=q50,
        q95=q95,
        n=n,
        lift_mean=float(lift.mean()) if len(lift) else None,
        lift_std=None if len(lift) == 0 else float(lift.std(ddof=1)) if len(lift) > 1 else 0.0,
        margin=abs(mean - theta) / std if std > 0 else None,
        agree=float(agree),
    )


def plan_layers(flows: Sequence[PromptFlow], theta: float, budget: float) -> tuple[LayerPlan, ...]:
    """One plan row per layer: mode by ``rho > theta`` (eq. 7), the same budget everywhere.

    Raises:
        InputError: no prompt holds both modalities, so rho says nothing about the model.
    """
    if not any(flow.uniform_rho > 0 for flow in flows):
        raise InputError(
            "no calibration prompt holds both text and images in its attention, so no flow can be measured; "
            "add prompts with images"
        )
    rho = layer_rho(flows)
    uniform = np.array([flow.uniform_rho for flow in flows])
    rows = [rho_statistics(rho[:, layer], uniform, theta) for layer in range(rho.shape[1])]
    return tuple(
        LayerPlan(index=index, mode=decide_mode(row.mean, theta), budget=budget, rho=row)
        for index, row in enumerate(rows)
    )


def token_statistics(flows: Sequence[PromptFlow]) -> TokenStatistics:
    """What the calibration prompts look like."""
    tokens = [flow.tokens for flow in flows]
    return TokenStatistics(
        total_mean=float(np.mean(tokens)),
        total_min=min(tokens),
        total_max=max(tokens),
        visual_share_mean=float(np.mean([flow.visual_tokens / flow.tokens for flow in flows])),
        images_mean=float(np.mean([flow.images for flow in flows])),
    )
