"""Profile again what a plan was made from, and compare: the drift gate behind ``flowmm check``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowmm.errors import InputError
from flowmm.models import LoadedModel
from flowmm.plans import LayerPlan, Plan, PlanDiff, diff
from flowmm.plans.diff import DEFAULT_ALPHA, DEFAULT_FAIL_ON, DEFAULT_TOLERANCE
from flowmm.profiler.calibration import CalibrationPrompts, calibration_name, open_calibration
from flowmm.profiler.profiling import MAX_BAD, OnSkip, Progress, profile
from flowmm.profiler.prompt_rho import PromptRho
from flowmm.profiler.samples import Sample
from flowmm.profiler.sources import GENERATED


def planned_prompts(
    plan: Plan,
    data: Sequence[str] = (),
    *,
    limit: int | None = None,
    seed: int | None = None,
    prompt: str | None = None,
    photo_size: bool = False,
) -> tuple[CalibrationPrompts, str, int]:
    """The prompts to profile on, their name, and their seed: by default the plan's own.

    Args:
        plan: a measured plan.
        data: sources as of :func:`open_calibration`; needed unless the plan was measured on generated prompts.
        limit: how many; by default as many as the plan was measured on, which is the same choice of the same data.
        seed: of the choice and of the generator; by default the plan's.
        prompt, photo_size: as of :func:`open_calibration`.

    Raises:
        InputError: the plan was not measured, its prompts are not at hand, or `data` cannot be read.
    """
    calibration = plan.calibration
    if calibration is None or not plan.measured:
        raise InputError(
            f"the plan of {plan.model.source} was never measured, so there is nothing to compare with; make a measured "
            "one with 'flowmm profile'"
        )
    if not data and calibration.source != GENERATED:
        raise InputError(
            f"the plan was measured on {calibration.source!r}, which is not at hand; give these prompts, or new ones "
            "of their kind, with --data"
        )
    data = data or (GENERATED,)
    seed = calibration.seed if seed is None else seed
    limit = limit or calibration.n_samples + calibration.n_skipped
    samples = open_calibration(data, limit=limit, seed=seed, prompt=prompt, photo_size=photo_size)
    return samples, calibration_name(data), seed


@dataclass(frozen=True)
class Rule:
    """What counts as drift; fields as of :func:`flowmm.plans.diff`."""

    tol: float = DEFAULT_TOLERANCE
    alpha: float = DEFAULT_ALPHA
    fail_on: Collection[str] = DEFAULT_FAIL_ON


def check(
    model: LoadedModel,
    plan: Plan,
    samples: Iterable[Sample],
    *,
    source: str,
    seed: int = 0,
    rule: Rule | None = None,
    old_rho: PromptRho | None = None,
    max_bad: float = MAX_BAD,
    progress: Progress | None = None,
    on_skip: OnSkip | None = None,
) -> PlanDiff:
    """Profile `model` with the method of `plan`, and compare what comes out with it.

    What a profile does not measure (budgets, curves, choices, modes that a person forced) is taken over from the plan.

    Args:
        model: loaded as for :func:`flowmm.profiler.profile`.
        plan: the plan that was agreed on.
        samples, source, seed: prompts, their name and their seed, such as those of :func:`planned_prompts`.
        rule: what counts as drift.
        old_rho: what the plan was made from; where `samples` are the same prompts, each is compared with itself.
        max_bad, progress, on_skip: as of :func:`flowmm.profiler.profile`.

    Raises:
        PlanMismatchError: the plan is for another architecture.
        InputError: as :func:`flowmm.profiler.profile` and :func:`flowmm.plans.diff`, or under torchrun.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a check runs in one process; for more, use 'flowmm profile' under torchrun and 'flowmm diff'")
    plan.check_model(model.fingerprint())
    rule = rule or Rule()
    with tempfile.TemporaryDirectory(prefix="flowmm-") as folder:
        records = Path(folder) / "records.parquet"
        measured = profile(
            model,
            samples,
            source=source,
            method=plan.method,
            seed=seed,
            records=records,
            max_bad=max_bad,
            progress=progress,
            on_skip=on_skip,
        )
        paired = None if old_rho is None else old_rho.changes_to(PromptRho.of_plan(records, measured))
    return diff(plan, as_planned(measured, plan), rule.tol, rule.fail_on, rule.alpha, paired)


def as_planned(measured: Plan, plan: Plan) -> Plan:
    """`measured` with the budgets, curves, choices and forced modes of `plan`, which a profile does not measure."""
    layers = [
        new.model_copy(
            update={"budget": old.budget, "curve": old.curve, "choice": old.choice}
            | ({} if _follows_rho(old) else {"mode": old.mode, "forced": old.forced})
        )
        for old, new in zip(plan.layers, measured.layers, strict=True)
    ]
    values = dict(measured) | {
        "layers": tuple(layers),
        "sensitivity": plan.sensitivity,
        "allocations": plan.allocations,
        "budget_rule": plan.budget_rule,
    }
    return type(plan).model_validate(values, by_name=True)


def _follows_rho(layer: LayerPlan) -> bool:
    return not (layer.forced or layer.mode == "online" or layer.mode_was_measured)
