"""The plan: one immutable object, one canonical text (``plans/FORMAT.md``)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from flowmm.errors import PlanMismatchError
from flowmm.plans.allocation import allocate, along_path
from flowmm.plans.budget_rules import BudgetRule
from flowmm.plans.canonical import canonical_text
from flowmm.plans.choices import LayerChoice, same_algorithm
from flowmm.plans.fields import MAX_LAYERS, Name, Note, Ratio, Record, Timestamp, rounded
from flowmm.plans.files import read_text, write_atomic
from flowmm.plans.fingerprint import (
    CalibrationFingerprint,
    Environment,
    Mismatch,
    ModelFingerprint,
    SensitivityFingerprint,
)
from flowmm.plans.layers import LayerPlan, Mode, RhoStatistics, decide_mode, scale_budgets
from flowmm.plans.method import MethodParameters
from flowmm.plans.migrations import SCHEMA, upgraded
from flowmm.plans.reading import dotted, format_error, parse

FLOWS_WITHOUT_MODES = ("off:any", "off:intra")
# Where a layer keeps the estimate that decides; the other kinds are in `estimates`.
FLOW_FIELDS = {"raw": "rho.mean", "lift": "rho.lift_mean"}
# Members of the top object that are absent at their default.
OPTIONAL = ("sensitivity", "allocations", "budget_rule", "note")
# Stored budgets are rounded, so their mean is only this close to the total.
BUDGET_TOLERANCE = 1e-4


Allocations = Annotated[
    tuple[Annotated[tuple[Ratio, ...], Field(min_length=1, max_length=MAX_LAYERS)], ...],
    Field(min_length=2, max_length=16 * MAX_LAYERS),
]


class Plan(Record):
    """What was measured on a model, and what each layer's KV cache shall become.

    Floats are rounded to the stored 6 digits on construction, so a plan equals the one its text reads back to.
    """

    schema_: Literal["flowmm.plan/1"] = Field(SCHEMA, alias="schema")
    flowmm_version: Name
    created_at: Timestamp
    model: ModelFingerprint
    calibration: CalibrationFingerprint | None
    method: MethodParameters
    layers: Annotated[tuple[LayerPlan, ...], Field(max_length=MAX_LAYERS)]
    environment: Environment | None
    sensitivity: SensitivityFingerprint | None = None
    allocations: Allocations | None = None
    budget_rule: BudgetRule | None = None
    note: Note = ""

    @field_validator("method")
    @classmethod
    def _as_stored(cls, method: MethodParameters) -> MethodParameters:
        values = method.model_dump()
        for name, value in values.items():
            if isinstance(value, str) and not value.isprintable():
                raise PydanticCustomError("control", "control characters are not allowed", {"path": ("method", name)})
        return method.model_validate({k: rounded(v) if isinstance(v, float) else v for k, v in values.items()})

    @model_validator(mode="after")
    def _layers_fit(self) -> Self:
        if len(self.layers) != self.model.num_layers:
            raise _misfit(("layers",), f"{len(self.layers)} layers, but model.num_layers is {self.model.num_layers}")
        for position, layer in enumerate(self.layers):
            if layer.index != position:
                raise _misfit(("layers", position, "index"), f"found {layer.index}, expected {position}")
            self._mode_fits(layer)
        with_curve = [layer.index for layer in self.layers if layer.curve is not None]
        if with_curve and len(with_curve) < len(self.layers):
            missing = next(layer.index for layer in self.layers if layer.curve is None)
            raise _misfit(("layers", missing, "curve"), "missing, but others have one. Give all layers one, or none")
        self._allocations_fit()
        mean = math.fsum(layer.budget for layer in self.layers) / len(self.layers)
        if abs(mean - self.method.budget) > BUDGET_TOLERANCE * self.method.budget:
            raise _misfit(
                ("method", "budget"),
                f"found {self.method.budget:.6g}, but the layers' budgets have the mean {mean:.6g}. Make them agree",
            )
        return self

    def _allocations_fit(self) -> None:
        means = [math.fsum(ratios) for ratios in self.allocations or ()]
        for place, ratios in enumerate(self.allocations or ()):
            if len(ratios) != len(self.layers):
                raise _misfit(("allocations", place), f"{len(ratios)} ratios, but {len(self.layers)} layers")
            if place and means[place] <= means[place - 1]:
                raise _misfit(("allocations", place), "keeps no more than the one before it. Sort them by their sums")
        if self.allocations and set(self.allocations[-1]) != {1.0}:
            raise _misfit(("allocations", len(means) - 1), "the last one keeps everything: expected only 1.0")

    def _mode_fits(self, layer: LayerPlan) -> None:
        if layer.forced or layer.mode == "online" or layer.mode_was_measured:
            return
        path, kind = ("layers", layer.index, "mode"), self.method.rho_kind
        flow, threshold = layer.flow(kind), self.method.threshold
        where, bound = FLOW_FIELDS.get(kind, f"estimates.{kind}"), "1" if kind == "lift" else f"theta {threshold:.6g}"
        if flow is None:
            if self.method.flow not in FLOWS_WITHOUT_MODES:
                missing = "rho" if layer.rho is None else where
                raise _misfit(path, f"{layer.mode!r}, but {missing} is null. Use 'online', or add \"forced\": true")
        elif layer.mode != decide_mode(flow, threshold):
            relation = ">" if flow > threshold else "<="
            raise _misfit(
                path,
                f"{layer.mode!r} contradicts {where} {flow:.6g} {relation} {bound}. "
                f'Use {decide_mode(flow, threshold)!r}, or add "forced": true',
            )

    @property
    def measured(self) -> bool:
        """Whether any layer has a rho."""
        return any(layer.rho is not None for layer in self.layers)

    @property
    def sha256(self) -> str:
        """Hash of the canonical text: 64 hex digits, what ``sha256sum`` says of a saved plan."""
        return hashlib.sha256(self.dumps().encode("utf-8")).hexdigest()

    @property
    def short_id(self) -> str:
        """First 12 digits of :attr:`sha256`, shown in reports."""
        return self.sha256[:12]

    def layer_budgets(self, ratio: float) -> tuple[float, ...]:
        """Ratio of entries kept per layer, [num_layers], with mean `ratio`.

        Along the measured allocations where the plan holds them (:func:`along_path`), else from the measured curves
        (:func:`allocate`), else every layer's own budget scaled alike (:func:`scale_budgets`).

        Raises:
            BudgetError: `ratio` is not in (0, 1].
        """
        curves = [layer.curve for layer in self.layers if layer.curve is not None]
        if self.allocations and 0 < ratio <= 1 and ratio != self.method.budget:
            return along_path(self.allocations, ratio)
        if curves and 0 < ratio <= 1 and ratio != self.method.budget:
            return allocate(curves, ratio)
        return scale_budgets([layer.budget for layer in self.layers], ratio)

    def layer_methods(self, method: MethodParameters) -> tuple[MethodParameters, ...]:
        """Parameters of each layer in a run that asks for `method`.

        The layers' choices were measured against the plan's method, so they apply where `method` compresses as that
        one does, whatever its budget.
        """
        return tuple(method if choice is None else choice.applied_to(method) for choice in self._choices_for(method))

    def layer_modes(self, method: MethodParameters) -> tuple[Mode, ...]:
        """Mode of each layer in a run that asks for `method`: as planned, but by rho where a choice does not apply."""
        return tuple(
            layer.mode
            if choice is not None or not layer.mode_was_measured
            else decide_mode(layer.flow(self.method.rho_kind) or 0.0, self.method.threshold)
            for layer, choice in zip(self.layers, self._choices_for(method), strict=True)
        )

    def _choices_for(self, method: MethodParameters) -> list[LayerChoice | None]:
        applies = same_algorithm(method, self.method)
        return [layer.choice if applies else None for layer in self.layers]

    def check_model(self, model: ModelFingerprint) -> list[Mismatch]:
        """Soft differences between the planned model and `model`, to warn about.

        Raises:
            PlanMismatchError: `model` is another architecture or has other layer or head counts.
        """
        mismatches = self.model.mismatches(model)
        hard = [str(mismatch) for mismatch in mismatches if mismatch.severity == "hard"]
        if hard:
            raise PlanMismatchError(
                f"the plan was made for {self.model.source}, not for {model.source}: {'; '.join(hard)}. "
                "Use a plan of this model, or make one with 'flowmm profile'"
            )
        return mismatches

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values in canonical order; optional fields at their default are absent."""
        values = self.model_dump(mode="json", by_alias=True)
        for layer in values["layers"]:
            _leave_out_defaults(layer, LayerPlan)
            if "choice" in layer:
                _leave_out_defaults(layer["choice"], LayerChoice)
            if layer["rho"] is not None:
                _leave_out_defaults(layer["rho"], RhoStatistics)
        if self.calibration is not None:
            _leave_out_defaults(values["calibration"], CalibrationFingerprint)
        if self.sensitivity is not None:
            _leave_out_defaults(values["sensitivity"], SensitivityFingerprint)
        for name in OPTIONAL:
            if values[name] == type(self).model_fields[name].default:
                del values[name]
        if values["method"]["rho_kind"] == "raw":
            del values["method"]["rho_kind"]
        return values

    def dumps(self) -> str:
        """The canonical text."""
        return canonical_text(self.as_json())

    @classmethod
    def loads(cls, text: str, origin: str = "plan") -> Self:
        """The plan in `text`; `origin` names it in messages.

        Raises:
            PlanFormatError: not a plan of ``plans/FORMAT.md``; says which field, on which line, and why.
            PlanVersionError: a schema this flowmm cannot read.
        """
        values = parse(text, origin)
        current = upgraded(values, origin)
        try:
            # Strict JSON validation: tuples come from lists, but nothing comes from a value of another type.
            return cls.model_validate_json(json.dumps(current), strict=True)
        except ValidationError as error:
            raise format_error(error, text, origin) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The plan in the file `path`.

        Raises:
            InputError: the file is missing or cannot be read.
            PlanFormatError, PlanVersionError: as :meth:`loads`.
        """
        return cls.loads(read_text(Path(path)), os.fspath(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the canonical text atomically: `path` holds the old plan or the whole new one.

        Raises:
            InputError: the directory is missing or cannot be written.
        """
        write_atomic(Path(path), self.dumps())


def _leave_out_defaults(values: dict[str, Any], record: type[Record]) -> None:
    for name, field in record.model_fields.items():
        if not field.is_required() and values[name] == field.default:
            del values[name]


def _misfit(path: tuple[str | int, ...], problem: str) -> PydanticCustomError:
    # Checks across fields carry their own path: pydantic would report them at the top of the plan.
    return PydanticCustomError(
        "plan_misfit", "{place}: {problem}", {"place": dotted(path), "problem": problem, "path": path}
    )
