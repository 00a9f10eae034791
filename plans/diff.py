"""What moved between two plans, and whether that is drift (``plans/FORMAT.md``, "Differences")."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel

from flowmm.errors import InputError
from flowmm.plans.layers import LayerPlan
from flowmm.plans.reading import PathStep, dotted
from flowmm.plans.schema import Plan

Kind = Literal["mode", "rho", "model", "method", "data"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DEFAULT_FAIL_ON: frozenset[Kind] = frozenset(KINDS) - {"data"}
DEFAULT_TOLERANCE = 0.02


@dataclass(frozen=True)
class Change:
    """One value that differs. `path` leads to it in the new plan; `exceeds` says whether it is more than tolerance."""

    kind: Kind
    path: tuple[PathStep, ...]
    old: Any
    new: Any
    exceeds: bool = True

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


def diff(old: Plan, new: Plan, tol: float = DEFAULT_TOLERANCE, fail_on: Collection[str] = DEFAULT_FAIL_ON) -> PlanDiff:
    """Compare two plans value by value.

    Args:
        old: the plan that was agreed on.
        new: the plan to judge.
        tol: largest |change| of rho (share) or of a layer's budget (ratio) that is not drift.
        fail_on: kinds that count as drift, of ``mode``, ``rho``, ``model``, ``method``, ``data``.

    Raises:
        InputError: `tol` is not in [0, 1], or an unknown kind.
    """
    if not 0 <= tol <= 1:
        raise InputError(f"tolerance {tol}: expected a number from 0 to 1")
    unknown = sorted(set(fail_on) - set(KINDS))
    if unknown:
        raise InputError(f"fail-on {', '.join(unknown)}: expected some of {', '.join(KINDS)}")
    changes = [
        *_records("model", ("model",), old.model, new.model),
        *_records("data", ("calibration",), old.calibration, new.calibration),
        *_records("method", ("method",), old.method, new.method),
    ]
    for before, after in zip(old.layers, new.layers, strict=False):
        changes += _layer(before, after, tol)
    return PlanDiff(old, new, tol, frozenset(kind for kind in KINDS if kind in fail_on), tuple(changes))


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


def _layer(old: LayerPlan, new: LayerPlan, tol: float) -> Iterator[Change]:
    path: tuple[PathStep, ...] = ("layers", new.index)
    if old.mode != new.mode:
        yield Change("mode", (*path, "mode"), old.mode, new.mode)
    if old.forced != new.forced:
        yield Change("mode", (*path, "forced"), old.forced, new.forced)
    yield from _moved("method", (*path, "budget"), old.budget, new.budget, tol)
    yield from _moved("rho", (*path, "rho", "mean"), _rho(old), _rho(new), tol)


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
    """One line for people: ``layer 11 rho 0.412 → 0.371 (Δ -0.041, tol 0.02)``."""
    place = f"layer {change.layer} {change.path[2]}" if change.layer is not None else dotted(change.path)
    line = f"{place} {_shown(change.old)} → {_shown(change.new)}"
    if change.delta is None or change.layer is None:
        return line
    sign = "-" if change.delta < 0 else "+"
    return f"{line} (Δ {sign}{abs(change.delta):.6g}, tol {tol:g})"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
