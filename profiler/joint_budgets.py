"""Layer budgets with all layers compressed at once: what each layer keeps is changed around what all keep now.

Curves of one layer compressed alone miss that layers stand in for each other: where two can find the same thing,
compressing either alone costs nothing. Here every layer has a curve *while all others are compressed*. The budgets that
these curves say cost least are tried on other prompts, curves are measured around the best of them, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from flowmm.plans import LayerPlan, Plan, SensitivityFingerprint
from flowmm.plans.allocation import Curve, along_path, cheapest
from flowmm.plans.layers import scale_budgets
from flowmm.profiler.joint_costs import BUDGETS, Arrangement, JointPrompts
from flowmm.profiler.profiling import Progress
from flowmm.profiler.racing import winner

Ratios = tuple[float, ...]
"""Of the entries that each layer keeps."""

# No layer keeps less.
LEAST = 0.005
# A layer's curve: what it keeps, times each of these.
FACTORS = (0.35, 0.7, 1.4, 2.8)
# One step changes what a layer keeps by these factors at most; a short step is one that curves can be trusted on.
REACHES = (1.5, 3.0)
# Prompts that measure curves, and as many others that try what follows from them; after a step that finds nothing twice
# as many, up to the second number, where it ends.
STEP_PROMPTS = (8, 32)
# Per total.
STEPS = 8


def step_sizes(prompts: int) -> tuple[int, int]:
    """:data:`STEP_PROMPTS`, or half of the prompts where those are fewer."""
    first, most = (min(count, max(1, prompts // 2)) for count in STEP_PROMPTS)
    return first, most


def changed_alone(ratios: Ratios) -> list[list[float]]:
    """Per layer, other ratios to measure: :data:`FACTORS` of its own, between :data:`LEAST` and 1."""
    around = ([min(max(own * factor, LEAST), 1.0) for factor in FACTORS] for own in ratios)
    return [[ratio for ratio in dict.fromkeys(of) if ratio != own] for of, own in zip(around, ratios, strict=True)]


def measure_curves(prompts: JointPrompts, planned: Arrangement, ratios: Ratios) -> list[Curve]:
    """Each layer's curve around `ratios`, the other layers compressed to theirs: what its ratios cost beyond its own.

    Every cost but the present one is taken a standard error over prompts above its mean, so that the least of many is
    not the luckiest.
    """
    changes = [(layer, ratio) for layer, of in enumerate(changed_alone(ratios)) for ratio in of]
    alone = [(*ratios[:layer], ratio, *ratios[layer + 1 :]) for layer, ratio in changes]
    cost = prompts.costs([replace(planned, ratios=one) for one in (ratios, *alone)])
    rise = cost[:, 1:] - cost[:, :1]
    error = rise.std(0, ddof=1) / len(rise) ** 0.5 if len(rise) > 1 else 0.0
    curves = [[(own, 0.0)] for own in ratios]
    for (layer, ratio), worse in zip(changes, (rise.mean(0) + error).tolist(), strict=True):
        curves[layer].append((ratio, worse))
    return [sorted(curve) for curve in curves]


def suggestions(curves: Sequence[Curve], ratios: Ratios, total: float) -> list[Ratios]:
    """Ratios that cost less than the present ones by the curves, within each of :data:`REACHES`, and half way there."""
    found: list[Ratios] = []
    for reach in REACHES:
        within = [
            [point for point in curve if own / reach <= point[0] <= own * reach]
            for curve, own in zip(curves, ratios, strict=True)
        ]
        there = cheapest(within, total)
        found += [there, tuple((one + own) / 2 for one, own in zip(there, ratios, strict=True))]
    return [one for one in dict.fromkeys(found) if one != ratios]


def measure_allocations(
    prompts: JointPrompts, plan: Plan, totals: Sequence[float] = BUDGETS, *, progress: Progress | None = None
) -> tuple[Ratios, ...]:
    """What layers keep of each of the totals :data:`BUDGETS`, and of everything.

    At each total steps are made as long as they lower the cost on prompts that did not suggest them. The smallest total
    begins with what `plan` gives its layers, each other one in proportion to what the one before found.

    Args:
        prompts: held in memory, because each step asks some of them again.
        plan: gives each layer's mode and parameters.
        totals: those at which steps are made.
        progress: called with (steps done, steps at most).
    """
    path = list[Ratios]()
    for total in BUDGETS:
        start = scale_budgets(path[-1] if path else plan.layer_budgets(total), total)
        path.append(_after_steps(prompts, plan, total, start, progress) if total in totals else start)
    return (*path, (1.0,) * len(plan.layers))


def _after_steps(prompts: JointPrompts, plan: Plan, total: float, start: Ratios, progress: Progress | None) -> Ratios:
    planned, before = Arrangement.planned(plan, total), BUDGETS.index(total) * STEPS
    size, most = step_sizes(len(prompts))
    ratios, place = start, 0
    for number in range(STEPS):
        if progress is not None:
            progress(before + number, STEPS * len(BUDGETS))
        first, second = prompts.window(place, size), prompts.window(place + size, size)
        better, place = _better(first, second, planned, total, ratios), place + size
        if better is not None:
            ratios = better
        elif size == most:
            break
        else:
            size = min(2 * size, most)
    if progress is not None:
        progress(before + STEPS, STEPS * len(BUDGETS))
    return ratios


def _better(
    first: JointPrompts, second: JointPrompts, planned: Arrangement, total: float, ratios: Ratios
) -> Ratios | None:
    """What the first prompts suggest and gains most on the second ones, if it holds there."""

    def measure(part: JointPrompts, proposed: Sequence[Ratios]) -> np.ndarray:
        return part.costs([replace(planned, ratios=one) for one in (ratios, *proposed)])

    return winner(suggestions(measure_curves(first, planned, ratios), ratios, total), [second], measure)


def with_budgets_of(plan: Plan, other: Plan) -> Plan:
    """`plan` with the layer budgets of another plan of the same architecture, at every total; its note says so.

    Raises:
        PlanMismatchError: the other plan was made for another architecture.
    """
    other.check_model(plan.model)
    ratios = other.layer_budgets(plan.method.budget)
    layers = tuple(
        layer.model_copy(update={"curve": of.curve, "budget": ratio})
        for layer, of, ratio in zip(plan.layers, other.layers, ratios, strict=True)
    )
    changes = {
        "layers": layers,
        "allocations": other.allocations,
        "sensitivity": other.sensitivity,
        "budget_rule": other.budget_rule,
        "note": f"Layer budgets were measured for plan {other.short_id}, with its layers' choices.",
    }
    return type(plan).model_validate(dict(plan) | changes, by_name=True)


def with_allocations(plan: Plan, path: Sequence[Ratios], protocols: Sequence[str], prompts: int) -> Plan:
    """`plan` with measured allocations, and its budget split along them; curves of single layers are dropped."""
    ratios = along_path(path, plan.method.budget)
    layers = tuple(
        LayerPlan.model_validate(layer.model_dump() | {"curve": None, "budget": ratio})
        for layer, ratio in zip(plan.layers, ratios, strict=True)
    )
    decided = None if plan.sensitivity is None else plan.sensitivity.budgets
    measured = SensitivityFingerprint(protocols=tuple(protocols), n_samples=prompts, budgets=decided)
    changes = {"layers": layers, "sensitivity": measured, "allocations": tuple(path), "budget_rule": None}
    return type(plan).model_validate(dict(plan) | changes, by_name=True)
