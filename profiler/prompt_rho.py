"""rho of every prompt behind a plan, from its records, so that the same prompts can be compared one by one.

Without torch, because comparing two plans needs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowmm.errors import InputError
from flowmm.plans import LayerPlan, Plan, decide_mode
from flowmm.plans.diff_statistics import Moments
from flowmm.profiler.records import read_tables
from flowmm.profiler.samples import dataset_sha256
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


def redrawn(plan: Plan, rho: np.ndarray) -> Plan:
    """`plan` as other prompts would have made it whose raw rho is `rho`, fp64 ``[prompts, layers]``: what a check
    compares (mean, spread, number of prompts, margin, mode) follows from them, all else stays.

    For judging the check itself on many draws without a profile for each.
    """
    means, stds = rho.mean(0), rho.std(0, ddof=1)

    def row(layer: LayerPlan) -> LayerPlan:
        if layer.rho is None:
            return layer
        mean, std = float(means[layer.index]), float(stds[layer.index])
        margin = abs(mean - plan.method.theta) / std
        measured = layer.rho.model_copy(update={"mean": mean, "std": std, "n": len(rho), "margin": margin})
        return layer.model_copy(update={"mode": decide_mode(mean, plan.method.theta), "rho": measured})

    return plan.model_copy(update={"layers": tuple(row(layer) for layer in plan.layers)})
