"""Layer budgets with all layers compressed at once: from the full cache down, the cheapest cut first.

Curves of one layer at a time miss that layers stand in for each other: where two can find the same thing, compressing
either alone costs nothing. Here every cut is measured on top of all cuts before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flowmm.plans import LayerPlan, Plan, SensitivityFingerprint
from flowmm.plans.allocation import along_path
from flowmm.profiler.joint_costs import Arrangement, JointPrompts
from flowmm.profiler.profiling import Progress

LEVELS = (1.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005)
# Levels that one cut may go down: past a ratio at which a layer happens to do worse than at less.
REACH = 3
# Cuts measured together.
WIDTH = 3


@dataclass(frozen=True)
class Allocation:
    """Ratios kept per layer, and what that costs (:func:`flowmm.profiler.joint_costs.shift_bound`)."""

    ratios: tuple[float, ...]
    cost: float


@dataclass(frozen=True)
class _Cut:
    """Lowering a layer to a level of :data:`LEVELS`, and what that was last measured to cost per entry it saves."""

    layer: int
    level: int
    slope: float = float("-inf")
    cost: float = 0.0
    fresh: bool = False


def measure_allocations(
    prompts: JointPrompts, plan: Plan, *, progress: Progress | None = None
) -> tuple[Allocation, ...]:
    """A path of allocations from almost nothing to everything, each one cut away from the next.

    The cut with the least cost per entry is made; a cut measured on an earlier state is measured again before it is
    believed.

    Args:
        prompts: held in memory, because each cut asks them again.
        plan: gives each layer's mode and parameters.
        progress: called with (levels passed, all levels).
    """
    full = Arrangement.planned(plan, 1.0)
    levels = [0] * len(plan.layers)
    path = [Allocation((1.0,) * len(levels), 0.0)]
    cuts = [_Cut(layer, level) for layer in range(len(levels)) for level in range(1, len(LEVELS))]
    total = len(cuts)
    while cuts:
        cut, cuts = _cheapest(prompts, full, levels, cuts, path[-1].cost)
        levels[cut.layer] = cut.level
        path.append(Allocation(tuple(LEVELS[level] for level in levels), cut.cost))
        cuts = [replace(other, fresh=False) for other in cuts if other.level > levels[other.layer]]
        if progress is not None:
            progress(total - len(cuts), total)
    return tuple(reversed(path))


def _cheapest(
    prompts: JointPrompts, full: Arrangement, levels: Sequence[int], cuts: Sequence[_Cut], cost: float
) -> tuple[_Cut, list[_Cut]]:
    """The best cut, measured on the present state, and all cuts with what was measured on the way."""
    known = {(cut.layer, cut.level): cut for cut in cuts}
    while True:
        near = [cut for cut in known.values() if cut.level - levels[cut.layer] <= REACH]
        ranked = sorted(near, key=lambda cut: cut.slope)
        if ranked[0].fresh:
            return ranked[0], list(known.values())
        stale = [cut for cut in ranked[:WIDTH] if not cut.fresh]
        lowered = [
            tuple(LEVELS[cut.level if layer == cut.layer else level] for layer, level in enumerate(levels))
            for cut in stale
        ]
        measured = prompts.costs([replace(full, ratios=ratios) for ratios in lowered], forget=False).mean(0)
        for cut, now in zip(stale, measured.tolist(), strict=True):
            saved = LEVELS[levels[cut.layer]] - LEVELS[cut.level]
            known[cut.layer, cut.level] = replace(cut, slope=(now - cost) / saved, cost=now, fresh=True)


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


def with_allocations(plan: Plan, path: Sequence[Allocation], protocols: Sequence[str], prompts: int) -> Plan:
    """`plan` with a measured path, and its budget split along it; curves of single layers are dropped."""
    ratios = along_path([allocation.ratios for allocation in path], plan.method.budget)
    layers = tuple(
        LayerPlan.model_validate(layer.model_dump() | {"curve": None, "budget": ratio})
        for layer, ratio in zip(plan.layers, ratios, strict=True)
    )
    decided = None if plan.sensitivity is None else plan.sensitivity.budgets
    measured = SensitivityFingerprint(protocols=tuple(protocols), n_samples=prompts, budgets=decided)
    changes = {
        "layers": layers,
        "sensitivity": measured,
        "allocations": tuple(allocation.ratios for allocation in path),
        "budget_rule": None,
    }
    return type(plan).model_validate(dict(plan) | changes, by_name=True)
