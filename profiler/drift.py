"""Profile again what a plan was made from, and compare: the drift gate behind ``flowmm check``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowmm.errors import InputError
from flowmm.models import LoadedModel
from flowmm.plans import Plan, PlanDiff, diff
from flowmm.plans.diff import DEFAULT_ALPHA, DEFAULT_FAIL_ON, DEFAULT_TOLERANCE
from flowmm.plans.diff_statistics import Moments
from flowmm.profiler.calibration import CalibrationPrompts, calibration_name, open_calibration
from flowmm.profiler.profile import MAX_BAD, OnSkip, Progress, profile
from flowmm.profiler.records import read_tables
from flowmm.profiler.samples import Sample, dataset_sha256
from flowmm.profiler.sources import GENERATED
from flowmm.profiler.statistics import Measurements

# Records hold all digits, plans six.
_ROUNDING = 2e-6
_ADVICE = "Give the records that 'flowmm profile' wrote together with this plan, or none"


@dataclass(frozen=True)
class PromptRho:
    """rho of every prompt of a profile: its content hashes ``[prompts]`` and fp64 shares ``[prompts, layers]``."""

    hashes: tuple[str, ...]
    rho: np.ndarray

    @classmethod
    def of_plan(cls, records: Path, plan: Plan) -> PromptRho:
        """Read the records that `plan` was made from.

        Raises:
            InputError: not a readable record file, or one of another plan.
        """
        hashes: list[str] = []
        parts = [np.empty((0, len(plan.layers)))]
        try:
            for table in read_tables(records):
                parts.append(Measurements.from_tables([table]).flows["raw"])
                hashes += table["sample_sha256"].to_pylist()[:: parts[-1].shape[1]]
        except (InputError, KeyError) as error:
            raise InputError(f"{records}: cannot be read as records ({error.__cause__ or error}). {_ADVICE}") from error
        if {part.shape[1] for part in parts} != {len(plan.layers)} or not _belongs(np.concatenate(parts), hashes, plan):
            raise InputError(f"{records}: holds other measurements than the plan {plan.short_id}. {_ADVICE}")
        return cls(tuple(hashes), np.concatenate(parts))

    def changes_to(self, new: PromptRho) -> list[Moments] | None:
        """Per layer, moments of new minus old rho of each prompt; None if the prompts are not the same ones."""
        if sorted(self.hashes) != sorted(new.hashes):
            return None
        old_order, new_order = (np.argsort(each.hashes, kind="stable") for each in (self, new))
        changes = new.rho[new_order] - self.rho[old_order]
        stds = changes.std(0, ddof=1) if len(changes) > 1 else np.zeros(changes.shape[1])
        return [Moments(float(m), float(s), len(changes)) for m, s in zip(changes.mean(0), stds, strict=True)]


def _belongs(rho: np.ndarray, hashes: Sequence[str], plan: Plan) -> bool:
    if plan.calibration is None or dataset_sha256(hashes) != plan.calibration.dataset_sha256:
        return False
    planned = [np.nan if layer.rho is None else layer.rho.mean for layer in plan.layers]
    return bool(np.allclose(rho.mean(0), planned, rtol=0, atol=_ROUNDING))


def prompt_rho(
    plan: Plan, path: Path, records: Path | None = None, note: Callable[[str], None] | None = None
) -> PromptRho | None:
    """rho of every prompt behind the plan in the file `path`, from `records` or from the file beside it; None: neither.

    Raises:
        InputError: `records` cannot be read or are of another plan. A file beside the plan is then left alone, and
            `note` is told.
    """
    beside = path.with_suffix(".records.parquet")
    if records is None and not beside.is_file():
        return None
    try:
        return PromptRho.of_plan(records or beside, plan)
    except InputError as error:
        if records is not None:
            raise
        if note is not None:
            note(f"{error}. Comparing with the plan's means instead")
        return None


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

    What a profile does not measure (budgets, curves, modes that a person forced) is taken over from the plan.

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
    """`measured` with the budgets, curves and forced modes of `plan`, which a profile does not measure."""
    layers = [
        new.model_copy(
            update={"budget": old.budget, "curve": old.curve}
            | ({"mode": old.mode, "forced": old.forced} if old.forced or old.mode == "online" else {})
        )
        for old, new in zip(plan.layers, measured.layers, strict=True)
    ]
    values = dict(measured) | {"layers": tuple(layers), "sensitivity": plan.sensitivity}
    return type(plan).model_validate(values, by_name=True)


def paired_changes(
    old: Plan, new: Plan, old_records: Path, new_records: Path, note: Callable[[str], None] | None = None
) -> list[Moments] | None:
    """Per layer, moments of new minus old rho where both plans saw the same prompts, else None.

    Args:
        old, new: the plans.
        old_records, new_records: record files of the plans.
        note: told why records do not help; without it that is an error.

    Raises:
        InputError: records that cannot be read or are of another plan, and no `note`.
    """
    try:
        return PromptRho.of_plan(old_records, old).changes_to(PromptRho.of_plan(new_records, new))
    except InputError as error:
        if note is None:
            raise
        note(f"{error}. Comparing the plans' means instead")
        return None
