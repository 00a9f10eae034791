"""Layer budgets with all layers compressed at once: from the full cache down, the cheapest cut first.

Curves of one layer at a time miss that layers stand in for each other: where two can find the same thing, compressing
either alone costs nothing. Here every cut is measured on top of all cuts before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from flowmm.errors import InputError
from flowmm.models import LoadedModel
from flowmm.plans import LayerPlan, MethodParameters, Mode, Plan, SensitivityFingerprint
from flowmm.plans.allocation import along_path
from flowmm.profiler.profiling import Progress
from flowmm.profiler.samples import CalibrationSample, Sample
from flowmm.profiler.sensitivity import MIXED, PROTOCOLS, Reading, check_protocols
from flowmm.runtime.budgets import entry_budget
from flowmm.runtime.cache import CompressionSettings
from flowmm.runtime.replay import build_trial, reading_caches

LEVELS = (1.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005)
# Levels that one cut may go down: past a ratio at which a layer happens to do worse than at less.
REACH = 3
# A token that is lost costs this many nats, however lost it is: few prompts must not decide for all.
LOST = 1.0
# Cuts measured together.
WIDTH = 3


@dataclass(frozen=True)
class Allocation:
    """Ratios kept per layer, and what that costs: KL(full || compressed) in nats, each token's at most :data:`LOST`."""

    ratios: tuple[float, ...]
    cost: float


@dataclass(frozen=True)
class _Prompts:
    """Prefilled prompts, and how the plan compresses them."""

    readings: Sequence[Reading]
    methods: tuple[MethodParameters, ...]

    def costs(self, candidates: Sequence[Sequence[float]]) -> list[float]:
        """Mean cost of each vector of ratios."""
        sums = torch.zeros(len(candidates), dtype=torch.float64)
        for reading in self.readings:
            made = [reading.cache(self._settings(ratios, reading.modes)) for ratios in candidates]
            sums += reading.divergence(made).clamp(max=LOST).mean(-1).double().cpu()
        return (sums / len(self.readings)).tolist()

    def _settings(self, ratios: Sequence[float], modes: tuple[Mode, ...]) -> CompressionSettings:
        def entries(length: int) -> list[int]:
            return [entry_budget(length, float(ratio)) for ratio in ratios]

        return CompressionSettings(self.methods[0], modes, entries, layer_methods=self.methods)


@dataclass(frozen=True)
class _Cut:
    """Lowering a layer to a level of :data:`LEVELS`, and what that was last measured to cost per entry it saves."""

    layer: int
    level: int
    slope: float = float("-inf")
    cost: float = 0.0
    fresh: bool = False


def measure_allocations(
    model: LoadedModel,
    plan: Plan,
    samples: Iterable[Sample],
    *,
    limit: int | None = None,
    protocols: Sequence[str] = MIXED,
    progress: Progress | None = None,
) -> tuple[Allocation, ...]:
    """A path of allocations from almost nothing to everything, each one cut away from the next.

    The cut with the least cost per entry is made; a cut measured on an earlier state is measured again before it is
    believed. The prompts' keys, values and queries stay in memory meanwhile.

    Args:
        progress: called with (levels passed, all levels).
        model, plan, samples, limit, protocols: as of :func:`flowmm.profiler.sensitivity.measure_sensitivity`.

    Raises:
        InputError: an unknown protocol, or no prompt that fits any of the protocols.
    """
    prompts = _Prompts(_read(model, plan, samples, limit, protocols), plan.layer_methods(plan.method))
    levels = [0] * len(plan.layers)
    path = [Allocation((1.0,) * len(levels), 0.0)]
    layers = range(len(levels))
    cuts = [_Cut(layer, level) for layer in layers for level in range(1, len(LEVELS))]
    total = len(cuts)
    with reading_caches(model.model):
        while cuts:
            cut, cuts = _cheapest(prompts, levels, cuts, path[-1].cost)
            levels[cut.layer] = cut.level
            path.append(Allocation(tuple(LEVELS[level] for level in levels), cut.cost))
            cuts = [replace(other, fresh=False) for other in cuts if other.level > levels[other.layer]]
            if progress is not None:
                progress(total - len(cuts), total)
    return tuple(reversed(path))


def _cheapest(prompts: _Prompts, levels: Sequence[int], cuts: Sequence[_Cut], cost: float) -> tuple[_Cut, list[_Cut]]:
    """The best cut, measured on the present state, and all cuts with what was measured on the way."""
    known = {(cut.layer, cut.level): cut for cut in cuts}
    while True:
        near = [cut for cut in known.values() if cut.level - levels[cut.layer] <= REACH]
        ranked = sorted(near, key=lambda cut: cut.slope)
        if ranked[0].fresh:
            return ranked[0], list(known.values())
        stale = [cut for cut in ranked[:WIDTH] if not cut.fresh]
        lowered = [
            [LEVELS[cut.level if layer == cut.layer else level] for layer, level in enumerate(levels)] for cut in stale
        ]
        for cut, measured in zip(stale, prompts.costs(lowered), strict=True):
            saved = LEVELS[levels[cut.layer]] - LEVELS[cut.level]
            known[cut.layer, cut.level] = replace(cut, slope=(measured - cost) / saved, cost=measured, fresh=True)


def _read(
    model: LoadedModel, plan: Plan, samples: Iterable[Sample], limit: int | None, protocols: Sequence[str]
) -> list[Reading]:
    check_protocols(protocols)
    readable = (sample for sample in samples if isinstance(sample, CalibrationSample))
    chats = [PROTOCOLS[name](sample.messages) for sample in islice(readable, limit) for name in protocols]
    readings = [Reading.of(model, plan, build_trial(model, chat)) for chat in chats if chat is not None]
    if not readings:
        raise InputError(
            f"no calibration prompt fits {' or '.join(protocols)}: 'blind' needs prompts whose last turn ends with a "
            "text behind other parts"
        )
    return readings


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
