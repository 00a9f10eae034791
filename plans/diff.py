"""What moved between two plans, and whether that is drift (``plans/FORMAT.md``, "Differences")."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from pydantic import BaseModel

from flowmm.errors import InputError
from flowmm.plans.diff_statistics import Moments, holm, margin_p, paired_p, welch_p
from flowmm.plans.fingerprint import ModelFingerprint
from flowmm.plans.layers import LayerPlan
from flowmm.plans.reading import PathStep, dotted
from flowmm.plans.schema import Plan

Kind = Literal["mode", "rho", "model", "method", "data"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DEFAULT_FAIL_ON: frozenset[Kind] = frozenset(KINDS) - {"data"}
DEFAULT_TOLERANCE = 0.02
DEFAULT_ALPHA = 0.01


@dataclass(frozen=True)
class Change:
    """One value that differs.

    `path` leads to it in the new plan. `exceeds` says whether it is more than tolerance and chance; a change of kind
    ``environment`` never does. `p` is that of "no change", corrected for the number of layers; None: not tested.
    """

    kind: Kind | Literal["environment"]
    path: tuple[PathStep, ...]
    old: Any
    new: Any
    exceeds: bool = True
    p: float | None = None

    @property
    def layer(self) -> int | None:
        """Index of the layer that changed; None for a change of the whole plan."""
        return (
            self.path[1] if self.path[0] == "layers" and len(self.path) > 1 and isinstance(self.path[1], int) else None
        )

    @property
    def delta(self) -> float | None:
        """new - old of two floats, without the noise of subtracting 6-digit decimals; else None."""
        if isinstance(self.old, float) and isinstance(self.new, float):
            return round(self.new - self.old, 9)
        return None


@dataclass(frozen=True)
class PlanDiff:
    """All differences between two plans, in the order of the format, with the rule that judged them."""

    old: Plan
    new: Plan
    tol: float
    fail_on: frozenset[Kind]
    changes: tuple[Change, ...]
    alpha: float = DEFAULT_ALPHA
    paired: bool = False

    @property
    def unsettled(self) -> tuple[Change, ...]:
        """Modes that flipped where the flow is too close to its threshold to tell on which side it lies."""
        return tuple(change for change in self.changes if change.kind == "mode" and not change.exceeds)

    @property
    def drift(self) -> tuple[Change, ...]:
        """The changes that count: above tolerance and of a kind in `fail_on`."""
        return tuple(change for change in self.changes if change.exceeds and change.kind in self.fail_on)

    @property
    def drifted(self) -> bool:
        """Whether anything counts as drift."""
        return bool(self.drift)

    @property
    def max_abs_rho(self) -> float | None:
        """Largest |change of rho.mean| over layers measured in both plans; None if there is none."""
        pairs = [
            abs(round(after.rho.mean - before.rho.mean, 9))
            for before, after in zip(self.old.layers, self.new.layers, strict=False)
            if before.rho is not None and after.rho is not None
        ]
        return max(pairs, default=None)


def diff(
    old: Plan,
    new: Plan,
    tol: float = DEFAULT_TOLERANCE,
    fail_on: Collection[str] = DEFAULT_FAIL_ON,
    alpha: float = DEFAULT_ALPHA,
    paired: Sequence[Moments] | None = None,
) -> PlanDiff:
    """Compare two plans value by value.

    Args:
        old: the plan that was agreed on.
        new: the plan to judge.
        tol: largest |change| of rho (share) or of a layer's budget (ratio) that is not drift.
        fail_on: kinds that count as drift, of ``mode``, ``rho``, ``model``, ``method``, ``data``.
        alpha: probability that prompts alone make any layer's rho look moved; 1 leaves it to the tolerance.
        paired: per layer, new minus old rho of the same prompts. Without it, the plans' own mean, std and n are
            compared as if the prompts were different ones.

    Raises:
        InputError: `tol` is not in [0, 1], `alpha` is not in (0, 1], or an unknown kind.
    """
    if not 0 <= tol <= 1:
        raise InputError(f"tolerance {tol}: expected a number from 0 to 1")
    if not 0 < alpha <= 1:
        raise InputError(f"alpha {alpha}: expected a number above 0, at most 1")
    unknown = sorted(set(fail_on) - set(KINDS))
    if unknown:
        raise InputError(f"fail-on {', '.join(unknown)}: expected some of {', '.join(KINDS)}")
    changes = [
        *_model(old.model, new.model),
        *_records("data", ("calibration",), old.calibration, new.calibration),
        *_records("method", ("method",), old.method, new.method),
    ]
    pairs = list(zip(old.layers, new.layers, strict=False))
    ps = holm([_rho_p(before, after, paired) for before, after in pairs])
    for (before, after), p in zip(pairs, ps, strict=True):
        changes += _modes(before, after, alpha, len(pairs))
        changes += _moved("method", ("layers", after.index, "budget"), before.budget, after.budget, tol)
        changes += _choices(before, after)
        changes += _rho_moved(before, after, tol, alpha, p)
    changes += _environment(old, new)
    counted = frozenset(kind for kind in KINDS if kind in fail_on)
    return PlanDiff(old, new, tol, counted, tuple(changes), alpha, paired is not None)


def _model(old: ModelFingerprint, new: ModelFingerprint) -> Iterator[Change]:
    """Another model or variant exceeds; dtype, attention implementation and what one side does not know do not."""
    differing = {mismatch.field for mismatch in old.mismatches(new)}
    for field in ModelFingerprint.model_fields:
        before, after = getattr(old, field), getattr(new, field)
        if before != after:
            yield Change("model", ("model", field), before, after, exceeds=field in differing)


def _environment(old: Plan, new: Plan) -> Iterator[Change]:
    """Versions and device, where both plans say; never drift by themselves."""
    if old.environment is None or new.environment is None:
        return
    for field, before in old.environment:
        after = getattr(new.environment, field)
        if before != after:
            yield Change("environment", ("environment", field), before, after, exceeds=False)


def _records(kind: Kind, path: tuple[PathStep, ...], old: BaseModel | None, new: BaseModel | None) -> Iterator[Change]:
    """A change per field that differs; one for the whole record when either side has none."""
    if old is None or new is None:
        if old is not new:
            yield Change(kind, path, _presence(old), _presence(new))
        return
    for field in type(old).model_fields:
        before, after = getattr(old, field), getattr(new, field)
        if isinstance(before, BaseModel):
            yield from _records(kind, (*path, field), before, after)
        elif before != after:
            yield Change(kind, (*path, field), before, after)


def _presence(record: BaseModel | None) -> str | None:
    return None if record is None else "present"


def _modes(old: LayerPlan, new: LayerPlan, alpha: float, layers: int) -> Iterator[Change]:
    path: tuple[PathStep, ...] = ("layers", new.index)
    if old.mode != new.mode:
        sides = (old, new)
        exceeds = not all(map(_follows_rho, sides)) or all(_is_settled(side, alpha, layers) for side in sides)
        yield Change("mode", (*path, "mode"), old.mode, new.mode, exceeds)
    if old.forced != new.forced:
        yield Change("mode", (*path, "forced"), old.forced, new.forced)


def _choices(old: LayerPlan, new: LayerPlan) -> Iterator[Change]:
    """Parameters of one layer; what they cost is not compared."""
    before, after = (None if layer.choice is None else str(layer.choice) for layer in (old, new))
    if before != after:
        yield Change("method", ("layers", new.index, "choice"), before, after)


def _follows_rho(layer: LayerPlan) -> bool:
    """Whether the mode came from a measurement, not from a person or from the choice to decide per prompt."""
    return not (layer.forced or layer.mode == "online" or layer.mode_was_measured or layer.rho is None)


def _is_settled(layer: LayerPlan, alpha: float, layers: int) -> bool:
    """Whether other prompts would give the same mode: the mean is clear of its threshold, or cannot be tested.

    The p value is multiplied by the number of layers (Bonferroni), since any of them may lie near the threshold.
    """
    if layer.rho is None or layer.rho.margin is None:
        return True
    p = margin_p(layer.rho.margin, layer.rho.n)
    return p is None or min(1.0, p * layers) <= alpha


def _rho_p(old: LayerPlan, new: LayerPlan, paired: Sequence[Moments] | None) -> float | None:
    if old.rho is None or new.rho is None:
        return None
    if paired is not None:
        return paired_p(paired[new.index])
    return welch_p(Moments(old.rho.mean, old.rho.std, old.rho.n), Moments(new.rho.mean, new.rho.std, new.rho.n))


def _rho_moved(old: LayerPlan, new: LayerPlan, tol: float, alpha: float, p: float | None) -> Iterator[Change]:
    """The change of rho; it exceeds where it is above tolerance and clear, or cannot be tested."""
    for change in _moved("rho", ("layers", new.index, "rho", "mean"), _rho(old), _rho(new), tol):
        yield replace(change, p=p, exceeds=change.exceeds and (p is None or p <= alpha))


def _rho(layer: LayerPlan) -> float | None:
    return None if layer.rho is None else layer.rho.mean


def _moved(
    kind: Kind, path: tuple[PathStep, ...], old: float | None, new: float | None, tol: float
) -> Iterator[Change]:
    if old == new:
        return
    change = Change(kind, path, old, new)
    yield Change(kind, path, old, new, exceeds=change.delta is None or abs(change.delta) > tol)


def describe(change: Change, tol: float) -> str:
    """One line for people: ``layer 11 rho 0.412 → 0.371 (Δ -0.041, tol 0.02, p 3e-06)``."""
    place = f"layer {change.layer} {change.path[2]}" if change.layer is not None else dotted(change.path)
    line = f"{place} {_shown(change.old)} → {_shown(change.new)}"
    if change.kind == "mode" and not change.exceeds:
        return f"{line} (unsettled: too close to the threshold to tell)"
    if change.delta is None or change.layer is None:
        return line
    sign = "-" if change.delta < 0 else "+"
    p = "" if change.p is None else f", p {change.p:.1g}"
    chance = ", could be chance" if abs(change.delta) > tol and not change.exceeds else ""
    return f"{line} (Δ {sign}{abs(change.delta):.6g}, tol {tol:g}{p}{chance})"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
