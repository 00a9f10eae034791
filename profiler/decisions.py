"""Choices by measurement: per layer the mode, merge operator, min_sim and tau that change the next token least.

One layer at a time is compressed to what it would keep at each of a few total budgets, with the plan's own parameters
and with every candidate, on the same prompts.

The rule against noise: a candidate replaces the plan's parameters only where its mean cost is lower by a tenth and by
:data:`LEAST_GAIN`, and a paired t-test over prompts says so at :data:`ALPHA` after Holm's correction over all
candidates of all layers. Of those, the one with the lowest mean is taken. Everything else stays as the method has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowmm.models import LoadedModel
from flowmm.plans import LayerPlan, MethodParameters, Plan, SensitivityFingerprint
from flowmm.plans.choices import LayerChoice
from flowmm.plans.diff_statistics import Moments, holm, paired_p
from flowmm.profiler.profiling import Progress
from flowmm.profiler.samples import Sample
from flowmm.profiler.sensitivity import MIXED, Variant, measure_costs, measure_sensitivity, with_measured_budgets

BUDGETS = (0.05, 0.1, 0.2)
OPERATORS = ("evict", "average", "pivotal", "keep_mass", "count_bias", "mass", "tangent")
SIMILARITIES = (-1.0, 0.5, 0.8)
GATES = ("none", "pivot_quantile:0.8")
ALPHA = 0.05
# Relative, and in nats.
LEAST_SHARE, LEAST_GAIN = 0.1, 1e-3

Changes = dict[str, Any]
"""Fields of a :class:`LayerChoice`."""


def candidates(layer: LayerPlan, method: MethodParameters) -> list[Changes]:
    """What may replace the method's parameters in a layer: operator with min_sim, tau, or mode.

    A mode that a person forced, or that each prompt decides, is left alone.
    """
    found: list[Changes] = [{"merge": "evict"}] if method.merge != "evict" else []
    for merge in OPERATORS:
        for min_sim in SIMILARITIES if merge != "evict" else ():
            both = {"merge": merge, "min_sim": min_sim}
            found.append({name: value for name, value in both.items() if value != getattr(method, name)})
    gate = method.tau if method.gate else "none"
    found += [{"tau": tau} for tau in GATES if tau != gate]
    if layer.mode != "online" and not layer.forced:
        found.append({"mode": "intra" if layer.mode == "cross" else "cross"})
    return [changes for changes in found if changes]


@dataclass(frozen=True)
class Comparison:
    """A candidate of one layer beside the plan's own parameters: ``[prompts]`` fp64 costs, means over budgets."""

    layer: int
    changes: Changes
    own: np.ndarray
    cost: np.ndarray

    @property
    def p(self) -> float | None:
        """Two-sided p of "no difference" over prompts."""
        gain = self.cost - self.own
        return paired_p(Moments(float(gain.mean()), float(gain.std(ddof=1)) if len(gain) > 1 else 0.0, len(gain)))

    @property
    def matters(self) -> bool:
        """Whether the mean cost is lower by enough to care."""
        own, gain = float(self.own.mean()), float((self.own - self.cost).mean())
        return gain >= max(LEAST_GAIN, LEAST_SHARE * own)


def clear_choices(comparisons: Sequence[Comparison]) -> dict[int, LayerChoice]:
    """By layer, the cheapest candidate that passes the rule against noise; layers without one are left out."""
    chosen: dict[int, Comparison] = {}
    ps = holm([comparison.p for comparison in comparisons])
    for comparison, p in zip(comparisons, ps, strict=True):
        if p is None or p > ALPHA or not comparison.matters:
            continue
        best = chosen.get(comparison.layer)
        if best is None or comparison.cost.mean() < best.cost.mean():
            chosen[comparison.layer] = comparison
    return {
        layer: LayerChoice(**best.changes, cost=(float(best.own.mean()), float(best.cost.mean())))
        for layer, best in chosen.items()
    }


def measure_choices(
    model: LoadedModel,
    plan: Plan,
    samples: Iterable[Sample],
    *,
    limit: int | None = None,
    protocols: Sequence[str] = MIXED,
    progress: Progress | None = None,
) -> list[Comparison]:
    """Costs of all candidates, at what :meth:`Plan.layer_budgets` gives each layer of the totals :data:`BUDGETS`.

    Args and errors as of :func:`flowmm.profiler.sensitivity.measure_sensitivity`.
    """
    totals = [plan.layer_budgets(total) for total in BUDGETS]
    ratios = [sorted({of_total[layer.index] for of_total in totals} - {1.0}) for layer in plan.layers]
    asked = [(layer.index, changes) for layer in plan.layers for changes in ({}, *candidates(layer, plan.method))]
    variants = [variant for layer, changes in asked for variant in _variants(plan, layer, changes, ratios[layer])]
    costs = measure_costs(model, plan, samples, variants, limit=limit, protocols=protocols, progress=progress)
    compared, place = [], 0
    own = np.zeros(len(costs))
    for layer, changes in asked:
        width = len(ratios[layer])
        mean = costs[:, place : place + width].mean(1) if width else np.zeros(len(costs))
        place += width
        if changes:
            compared.append(Comparison(layer, changes, own, mean))
        else:
            own = mean
    return compared


def _variants(plan: Plan, layer: int, changes: Changes, ratios: Sequence[float]) -> Iterator[Variant]:
    method = LayerChoice(**changes, cost=(0.0, 0.0)).applied_to(plan.method) if changes else plan.method
    for ratio in ratios:
        yield Variant(layer, ratio, method, changes.get("mode", plan.layers[layer].mode))


def with_choices(plan: Plan, comparisons: Sequence[Comparison], protocols: Sequence[str]) -> Plan:
    """`plan` with the choices that :func:`clear_choices` makes; curves are left as they are."""
    choices = clear_choices(comparisons)
    layers = tuple(
        layer.model_copy(update={"choice": choice, "mode": choice.mode or layer.mode})
        if (choice := choices.get(layer.index))
        else layer
        for layer in plan.layers
    )
    count = len(comparisons[0].cost) if comparisons else 0
    decided = SensitivityFingerprint(protocols=tuple(protocols), n_samples=max(count, 1), budgets=BUDGETS)
    return type(plan).model_validate(dict(plan) | {"layers": layers, "sensitivity": decided}, by_name=True)


def measure_layers(
    model: LoadedModel,
    plan: Plan,
    samples: Iterable[Sample],
    *,
    budgets: bool,
    choices: bool,
    limit: int | None = None,
    protocols: Sequence[str] = MIXED,
    progress: Progress | None = None,
) -> Plan:
    """`plan` with what one-layer-at-a-time measurements say about it.

    Args:
        budgets: measure curves, and split the plan's budget by them.
        choices: measure candidates, and store the clear choices; curves of layers with one are measured again.
        model, samples, limit, protocols, progress: as of :func:`flowmm.profiler.sensitivity.measure_sensitivity`.

    Raises:
        InputError: an unknown protocol, or no prompt that fits any of the protocols.
    """
    how: dict[str, Any] = {"limit": limit, "protocols": protocols, "progress": progress}
    curves = measure_sensitivity(model, plan, samples, **how) if budgets else None
    if curves is not None:
        plan = with_measured_budgets(plan, curves, protocols)
    if choices:
        plan = with_choices(plan, measure_choices(model, plan, samples, **how), protocols)
        changed = [layer.index for layer in plan.layers if layer.choice is not None]
        if curves is not None and changed:
            again = measure_sensitivity(model, plan, samples, layers=changed, **how)
            plan = with_measured_budgets(plan, curves.with_layers(changed, again), protocols)
    return plan
