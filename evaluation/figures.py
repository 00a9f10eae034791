"""Figures and tables of the paper, measured again: one command each: SVG, PNG and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowmm.errors import InputError
from flowmm.evaluation.charts import PERCENT_AXIS, Axis, Panel, Point, Series, dot_chart, line_chart, linear_axis
from flowmm.evaluation.comparison import Line
from flowmm.evaluation.curves import budget_axis
from flowmm.evaluation.drawing import Drawing
from flowmm.evaluation.lab import Lab, as_csv, run_study
from flowmm.evaluation.methods import FULL
from flowmm.evaluation.plan_kinds import FLOW_KINDS
from flowmm.evaluation.studies import THETAS, Block, Study
from flowmm.plans import Plan
from flowmm.plans.files import write_atomic
from flowmm.plans.method import FlowKind

CURVE_BUDGETS = (0.6, 0.4, 0.2, 0.1, 0.05, 0.02)

INVERTED = Study(
    "inverted",
    "Aligned against inverted merging (Fig. 3b)",
    "What does it cost to merge against the layers' modes?",
    (Block((FULL, "paper", "paper:inverted", "paper:same_pivots_evicted", "robust", "robust:inverted")),),
    CURVE_BUDGETS[1:-1],
)
CURVES = Study(
    "budgets",
    "Budget curves (Fig. 4)",
    "How far can the cache shrink?",
    (
        Block(
            (
                FULL,
                *(f"{preset}@measured" for preset in ("robust", "aware", "reuse", "evict")),
                "robust",
                "evict",
                "paper",
                "robust:random_pivots",
            )
        ),
    ),
    CURVE_BUDGETS,
)
THETA = Study(
    "theta",
    "Theta sweep (Table 3)",
    "At which theta should a layer merge across modalities?",
    (Block((FULL, *(f"{preset}:theta={theta}@online" for preset in ("paper", "robust") for theta in THETAS))),),
    (0.2,),
)
ABLATION = Study(
    "ablation",
    "Component ablation (Table 4)",
    "What does each component of the method contribute?",
    (
        Block(
            (
                FULL,
                *(
                    f"{preset}{control}"
                    for preset in ("paper", "robust")
                    for control in ("", ":any_pivot", ":intra_only", ":strict_cross", ":same_pivots_evicted")
                ),
                "paper:gate_off",
                "robust:gate=true",
                "paper:random_pivots",
                "robust:random_pivots",
                "paper:uniform_stride",
                "robust:uniform_stride",
            )
        ),
    ),
    (0.2,),
)


@dataclass(frozen=True)
class Figure:
    """A drawing and the numbers in it."""

    drawing: Drawing
    table: str


def draw_rho(plan: Plan) -> Figure:
    """Cross-modal share of the attention by layer (Fig. 3a), and the other estimators of the same quantity.

    Raises:
        InputError: the plan holds no measured rho.
    """
    if not plan.measured:
        raise InputError("the plan holds no rho; make one with 'flowmm profile'")
    shares = tuple(_flow_series(plan, kind) for kind in FLOW_KINDS if kind != "lift")
    panels = (Panel("share of attention that crosses", shares, plan.method.theta),)
    layers = Axis("layer", tuple((layer.index, str(layer.index)) for layer in plan.layers), 0, len(plan.layers) - 1)
    rows = [
        {"layer": layer.index, "mode": layer.mode, "estimator": kind, "value": layer.flow(kind)}
        | dict(zip(("low", "high"), _interval(plan, layer.index, kind), strict=True))
        for layer in plan.layers
        for kind in FLOW_KINDS
    ]
    return Figure(line_chart(panels, layers, linear_axis("share", 1.0), "theta"), _csv(rows))


def _flow_series(plan: Plan, kind: FlowKind) -> Series:
    points = []
    for layer in plan.layers:
        value = layer.flow(kind)
        if value is not None:
            points.append(Point(layer.index, value, *_interval(plan, layer.index, kind)))
    return Series("rho" if kind == "raw" else kind, tuple(points))


def _interval(plan: Plan, layer: int, kind: str) -> tuple[float | None, float | None]:
    """95 % interval of an estimate over prompts, where the plan holds one."""
    chosen = plan.layers[layer]
    if kind in ("raw", "lift"):
        ends = None if chosen.rho is None else chosen.rho.ci95 if kind == "raw" else chosen.rho.lift_ci95
        return (None, None) if ends is None else ends
    return (None, None) if chosen.estimates is None else getattr(chosen.estimates, kind)[1:]


def _by_budget(study: Study, lines: Sequence[Line]) -> Drawing:
    panels = []
    for protocol in study.protocols:
        own = [line for line in lines if line.protocol == protocol]
        series = [
            Series(name, tuple(_point(line, line.budget) for line in reversed(own) if line.variant == name))
            for name in study.blocks[0].variants
            if name != FULL
        ]
        panels.append(Panel(protocol, tuple(series), _level(own)))
    return line_chart(panels, budget_axis(study.budgets), PERCENT_AXIS, "full cache")


def _by_theta(study: Study, lines: Sequence[Line]) -> Drawing:
    panels = []
    for protocol in study.protocols:
        own = [line for line in lines if line.protocol == protocol]
        series = []
        for preset in ("paper", "robust"):
            named = {f"{preset}:theta={theta}@online": theta for theta in THETAS}
            points = [_point(line, named[line.variant]) for line in own if line.variant in named]
            series.append(Series(preset, tuple(points)))
        panels.append(Panel(protocol, tuple(series), _level(own)))
    axis = Axis("theta", tuple((theta, f"{theta:g}") for theta in THETAS), THETAS[0], THETAS[-1])
    return line_chart(panels, axis, PERCENT_AXIS, "full cache")


def _by_component(study: Study, lines: Sequence[Line]) -> Drawing:
    panels = []
    names = [name for name in study.blocks[0].variants if name != FULL]
    for protocol in study.protocols:
        own = [line for line in lines if line.protocol == protocol]
        points = {line.variant: _point(line, 0.0) for line in own}
        panels.append(Panel(protocol, tuple(Series(name, (points[name],)) for name in sorted(names)), _level(own)))
    ticks = tuple((step / 4, f"{25 * step} %") for step in range(5))
    return dot_chart(panels, Axis("accuracy at 20 % of the entries", ticks, 0.0, 1.0))


def _point(line: Line, x: float) -> Point:
    return Point(x, line.accuracy, line.low, line.high)


def _level(lines: Sequence[Line]) -> float | None:
    return next((line.accuracy for line in lines if line.variant == FULL), None)


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


DRAWN: dict[str, tuple[Study, Callable[[Study, Sequence[Line]], Drawing]]] = {
    "inverted": (INVERTED, _by_budget),
    "budgets": (CURVES, _by_budget),
    "theta": (THETA, _by_theta),
    "ablation": (ABLATION, _by_component),
}
FIGURES = ("rho", *DRAWN)


def draw(name: str, lab: Lab) -> Figure:
    """Measure what a figure shows, or take it from disk, and draw it.

    Raises:
        InputError: no such figure; see also :meth:`Lab.measure`.
    """
    if name == "rho":
        return draw_rho(lab.plan)
    if name not in DRAWN:
        raise InputError(f"figure {name!r}: expected one of {', '.join(FIGURES)}")
    study, drawing = DRAWN[name]
    (lines,) = run_study(lab, study)
    return Figure(drawing(study, lines), as_csv(study, [lines], lab.weights))


def write_figure(name: str, lab: Lab, out: Path) -> list[Path]:
    """Write ``NAME.svg``, ``NAME.png`` and ``NAME.csv`` into `out`; returns the paths.

    Raises:
        InputError: see :func:`draw`, or the directory cannot be written.
    """
    figure = draw(name, lab)
    out.mkdir(parents=True, exist_ok=True)
    contents = {"svg": figure.drawing.svg(), "png": figure.drawing.png(), "csv": figure.table}
    for kind, content in contents.items():
        write_atomic(out / f"{name}.{kind}", content)
    return [out / f"{name}.{kind}" for kind in contents]
