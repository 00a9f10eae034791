"""Small charts: lines with intervals, and dots by category; a panel per protocol or kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowmm.evaluation.drawing import INK, Dot, Drawing, Line, Place, Shape, Text

PANEL_WIDTH, PANEL_HEIGHT = 340, 260
LEFT, TOP, GAP, BOTTOM = 68, 40, 62, 44
LETTER = 6.4
ROW = 26
# Distinguishable without colour vision (Okabe and Ito), dark enough on white; more series start again, dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#333333")
FAINT = "#d9d9d9"
LEVEL_DASHES = (2.0, 3.0)
REPEATED_DASHES = (6.0, 3.0)


@dataclass(frozen=True)
class Point:
    """A value at `x`, with the ends of its interval where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """One line, its points by rising x."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One chart; `level` is a dashed horizontal line."""

    title: str
    series: tuple[Series, ...]
    level: float | None = None


@dataclass(frozen=True)
class Axis:
    """Title, ticks and range of an axis; `logarithmic` spreads values by their logarithm."""

    title: str
    ticks: tuple[tuple[float, str], ...]
    low: float
    high: float
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Place of a value between the ends, 0 to 1 (0.5 where the ends are equal)."""
        low, high, place = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return 0.5 if low == high else (place - low) / (high - low)


PERCENT_AXIS = Axis("accuracy", tuple((step / 5, f"{20 * step} %") for step in range(6)), 0.0, 1.0)


def linear_axis(title: str, high: float) -> Axis:
    """From 0 to `high` in five steps."""
    return Axis(title, tuple((high * step / 5, f"{high * step / 5:.2g}") for step in range(6)), 0.0, high)


def line_chart(panels: Sequence[Panel], x_axis: Axis, y_axis: Axis, level_name: str) -> Drawing:
    """The panels side by side, and a legend."""
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    right = LEFT + len(panels) * (PANEL_WIDTH + GAP) - 30
    shapes: list[Shape] = []
    for place, panel in enumerate(panels):
        left = LEFT + place * (PANEL_WIDTH + GAP)
        shapes += _axes(panel.title, x_axis, y_axis, left, first=place == 0)
        if panel.level is not None:
            y = _y(y_axis, panel.level)
            shapes.append(Line(((left, y), (left + PANEL_WIDTH, y)), INK, dashes=LEVEL_DASHES))
        for series in panel.series:
            number = names.index(series.name)
            # Neighbouring intervals would hide each other.
            aside = (number - (len(names) - 1) / 2) * min(4.0, 24 / len(names))
            shapes += _curve(series, number, x_axis, y_axis, left + aside)
    width = right + 60 + LETTER * max(map(len, [*names, level_name]))
    height = TOP + max(PANEL_HEIGHT, 20 * (len(names) + 1)) + BOTTOM
    return Drawing(width, height, (*shapes, *_legend(names, level_name, right)))


def dot_chart(panels: Sequence[Panel], x_axis: Axis) -> Drawing:
    """In each panel a row per series, whose only point's `y` lies on the x axis; a dashed level."""
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    start = 24 + LETTER * max(map(len, names))
    bottom = TOP + ROW * len(names)
    shapes: list[Shape] = []
    for place, panel in enumerate(panels):
        left = start + place * (PANEL_WIDTH + 30)
        shapes.append(_title(panel.title, left))
        for value, label in x_axis.ticks:
            x = left + _x(x_axis, value)
            shapes += [Line(((x, TOP), (x, bottom)), FAINT), Text(label, (x, bottom + 18), "middle")]
        if panel.level is not None:
            x = left + _x(x_axis, panel.level)
            shapes.append(Line(((x, TOP), (x, bottom)), INK, dashes=LEVEL_DASHES))
        for series in panel.series:
            shapes += _dot_row(series, names.index(series.name), x_axis, left, labelled=place == 0)
        shapes.append(Text(x_axis.title, (left + PANEL_WIDTH / 2, bottom + 36), "middle"))
    return Drawing(start + len(panels) * (PANEL_WIDTH + 30), bottom + BOTTOM, tuple(shapes))


def _dot_row(series: Series, number: int, axis: Axis, left: float, labelled: bool) -> list[Shape]:
    y, point = TOP + ROW * (number + 0.5), series.points[0]
    shapes: list[Shape] = [Text(series.name, (left - 12, y + 4), "end")] if labelled else []
    if point.low is not None and point.high is not None:
        shapes.append(Line(((left + _x(axis, point.low), y), (left + _x(axis, point.high), y)), COLOURS[0], 2))
    return [*shapes, Dot((left + _x(axis, point.y), y), 4, COLOURS[0], f"{series.name}: {point.y:.3f}")]


def _title(text: str, left: float) -> Text:
    return Text(text, (left + PANEL_WIDTH / 2, TOP - 14), "middle", bold=True)


def _x(axis: Axis, value: float) -> float:
    return 16 + axis.share(value) * (PANEL_WIDTH - 32)


def _y(axis: Axis, value: float) -> float:
    return TOP + PANEL_HEIGHT * (1 - axis.share(value))


def _axes(title: str, x_axis: Axis, y_axis: Axis, left: float, first: bool) -> list[Shape]:
    shapes: list[Shape] = [_title(title, left)]
    for value, label in y_axis.ticks:
        y = _y(y_axis, value)
        shapes += [Line(((left, y), (left + PANEL_WIDTH, y)), FAINT), Text(label, (left - 8, y + 4), "end")]
    bottom = TOP + PANEL_HEIGHT
    shapes += [Text(label, (left + _x(x_axis, value), bottom + 18), "middle") for value, label in x_axis.ticks]
    shapes.append(Text(x_axis.title, (left + PANEL_WIDTH / 2, bottom + 36), "middle"))
    if first:
        shapes.append(Text(y_axis.title, (left - 54, TOP + PANEL_HEIGHT / 2), "middle", upright=True))
    return shapes


def _style(number: int) -> tuple[str, tuple[float, float] | None]:
    """Colour and dashes of the n-th series."""
    return COLOURS[number % len(COLOURS)], REPEATED_DASHES if number >= len(COLOURS) else None


def _curve(series: Series, number: int, x_axis: Axis, y_axis: Axis, left: float) -> list[Shape]:
    colour, dashes = _style(number)
    places: list[Place] = [(left + _x(x_axis, point.x), _y(y_axis, point.y)) for point in series.points]
    shapes: list[Shape] = [Line(tuple(places), colour, 2, dashes)]
    for point, (x, y) in zip(series.points, places, strict=True):
        if point.low is not None and point.high is not None:
            shapes.append(Line(((x, _y(y_axis, point.low)), (x, _y(y_axis, point.high))), colour))
        shapes.append(Dot((x, y), 3.2, colour, f"{series.name} at {point.x:g}: {point.y:.3f}"))
    return shapes


def _legend(names: Sequence[str], level_name: str, left: float) -> list[Shape]:
    entries = [(name, *_style(number)) for number, name in enumerate(names)]
    shapes: list[Shape] = []
    for place, (name, colour, dashes) in enumerate([*entries, (level_name, INK, LEVEL_DASHES)]):
        y = TOP + 10 + 20 * place
        shapes += [Line(((left, y), (left + 22, y)), colour, 2, dashes), Text(name, (left + 30, y + 4))]
    return shapes
