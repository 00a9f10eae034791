"""One number per layer that a budget rule goes by, from the queries and keys of calibration prompts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from flowmm.errors import InputError
from flowmm.models import LoadedModel
from flowmm.plans import LayerPlan, Plan, scale_budgets
from flowmm.plans.budget_rules import MEASURED_RULES, BudgetRule, rule_shares
from flowmm.profiler.profiling import Progress
from flowmm.profiler.samples import Sample, readable_samples
from flowmm.profiler.sensitivity import aware
from flowmm.runtime.importance import rows_attention
from flowmm.runtime.prompt import PromptLayout
from flowmm.runtime.replay import build_trial, prefill

# Rows at a time; memory is O(heads * rows * length).
BLOCK = 64


def cross_modal_entropy(query: Tensor, key: Tensor, layout: PromptLayout, scaling: float) -> float:
    """Entropy in nats of text rows over visual columns plus that of visual rows over text columns (MEDA, eq. 4).

    Each attention is restricted to the other modality and not causal; mean over rows and heads. 0 with one modality.

    Args:
        query: ``[1, Hq, L, D]``; key: ``[1, Hkv, L, D]``, after RoPE.
        layout: of one prompt without padding.
        scaling: softmax scale.
    """
    if not bool(layout.mixed.all()):
        return 0.0
    visual = layout.visual[0]
    keys = key[0].float().repeat_interleave(query.shape[1] // key.shape[1], dim=0)
    return sum(_mean_entropy(query[0][:, rows].float() * scaling, keys[:, ~rows]) for rows in (visual, ~visual))


def _mean_entropy(query: Tensor, key: Tensor) -> float:
    total = sum(
        float(torch.special.entr((rows @ key.transpose(-1, -2)).softmax(-1)).sum())
        for rows in query.split(BLOCK, dim=1)
    )
    return total / (query.shape[0] * query.shape[1])


def received_variance(query: Tensor, key: Tensor, layout: PromptLayout, scaling: float) -> float:
    """Variance over columns of the attention they receive from all rows (D2O).

    As in D2O's released code each head's variance is min-max-normalised over the heads of the layer, then averaged, so
    that the result lies in [0, 1].

    Args:
        query, key, layout, scaling: as of :func:`cross_modal_entropy`.
    """
    length = query.shape[2]
    received = torch.zeros(query.shape[1], length, device=query.device)
    for rows in torch.arange(length, device=query.device).split(BLOCK):
        attention = rows_attention(query, key, rows[None], layout.valid, scaling)
        received += attention.sum(3).reshape(query.shape[1], length)
    variance = received.var(-1, correction=0)
    low, high = variance.aminmax()
    return float(((variance - low) / (high - low).clamp(min=1e-12)).mean())


STATISTICS = {"entropy": cross_modal_entropy, "variance": received_variance}


def measure_statistic(
    model: LoadedModel,
    rule: BudgetRule,
    samples: Iterable[Sample],
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """``[layers]``: the statistic of a rule, mean over calibration prompts; one prefill each.

    Args:
        model: loaded with sdpa or eager attention.
        rule: one of :data:`flowmm.plans.budget_rules.MEASURED_RULES`.
        samples: calibration prompts; unreadable ones are passed over.
        limit: use at most so many.
        progress: called with (finished prompts, `limit`).

    Raises:
        InputError: no prompt can be read.
    """
    statistic, rows = STATISTICS[rule], []
    for done, sample in enumerate(readable_samples(samples, limit), start=1):
        chat = aware(sample)
        prefilled = prefill(model.model, build_trial(model, chat))
        rows.append([statistic(q, k, prefilled.layout, prefilled.scaling) for q, k, _ in prefilled.states])
        if progress is not None:
            progress(done, limit)
    if not rows:
        raise InputError("none of the calibration prompts can be read, so no layer budgets can be made of them")
    return np.mean(rows, axis=0).tolist()


def with_rule_budgets(plan: Plan, rule: BudgetRule, statistic: list[float] | None = None) -> Plan:
    """`plan` with its budget split among the layers by a rule; `statistic` as :func:`measure_statistic` gives it.

    Raises:
        InputError: the rule needs a statistic, and there is none.
    """
    if statistic is None:
        if rule in MEASURED_RULES:
            raise InputError(f"layer budgets by {rule} need a statistic of each layer")
        statistic = [0.0] * len(plan.layers)
    ratios = scale_budgets(rule_shares(rule, statistic), plan.method.budget)
    layers = tuple(
        LayerPlan.model_validate(layer.model_dump() | {"budget": ratio})
        for layer, ratio in zip(plan.layers, ratios, strict=True)
    )
    kept = {name: getattr(plan, name) for name in Plan.model_fields if name != "schema_"}
    return Plan.model_validate(kept | {"layers": layers, "budget_rule": None if rule == "uniform" else rule})
