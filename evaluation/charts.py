"""Small charts as SVG text: lines with intervals, and dots by category; a panel per protocol or kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

PANEL_WIDTH, PANEL_HEIGHT = 340, 260
LEFT, TOP, GAP, BOTTOM = 68, 40, 62, 44
LETTER = 6.4
ROW = 26
# Distinguishable without colour vision (Okabe and Ito), dark enough on white; more series start again, dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#333333")
INK, FAINT = "#222222", "#d9d9d9"


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


def line_chart(panels: Sequence[Panel], x_axis: Axis, y_axis: Axis, level_name: str) -> str:
    """One SVG document: the panels side by side, and a legend."""
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    legend_width = 60 + LETTER * max(map(len, [*names, level_name]))
    width = LEFT + len(panels) * (PANEL_WIDTH + GAP) - 30 + legend_width
    height = TOP + max(PANEL_HEIGHT, 20 * (len(names) + 1)) + BOTTOM
    parts = _opening(width, height)
    for place, panel in enumerate(panels):
        parts.append(f'<g transform="translate({LEFT + place * (PANEL_WIDTH + GAP)} {TOP})">')
        parts += _axes(panel.title, x_axis, y_axis, first=place == 0)
        if panel.level is not None:
            y = _y(y_axis, panel.level)
            line = f'<line x1="0" x2="{PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{INK}" stroke-dasharray="2 3"/>'
            parts.append(line)
        for series in panel.series:
            number = names.index(series.name)
            # Neighbouring intervals would hide each other.
            aside = (number - (len(names) - 1) / 2) * min(4.0, 24 / len(names))
            parts.append(f'<g transform="translate({aside:.1f} 0)">')
            parts += [*_curve(series, number, x_axis, y_axis), "</g>"]
        parts.append("</g>")
    parts += _legend(names, level_name, LEFT + len(panels) * (PANEL_WIDTH + GAP) - 30)
    return "\n".join([*parts, "</svg>", ""])


def dot_chart(panels: Sequence[Panel], x_axis: Axis) -> str:
    """One SVG document: in each panel a row per series, whose only point's `y` lies on the x axis; a dashed level."""
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    left = 24 + LETTER * max(map(len, names))
    tall = ROW * len(names)
    width, height = left + len(panels) * (PANEL_WIDTH + 30), TOP + tall + BOTTOM
    parts = _opening(width, height)
    for place, panel in enumerate(panels):
        parts.append(f'<g transform="translate({left + place * (PANEL_WIDTH + 30):.1f} {TOP})">')
        parts.append(_title(panel.title))
        for value, label in x_axis.ticks:
            x = _x(x_axis, value)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{tall}" stroke="{FAINT}"/>')
            parts.append(f'<text x="{x:.1f}" y="{tall + 18}" text-anchor="middle">{escape(label)}</text>')
        if panel.level is not None:
            x = _x(x_axis, panel.level)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{tall}" stroke="{INK}" stroke-dasharray="2 3"/>')
        for series in panel.series:
            parts += _dot_row(series, names.index(series.name), x_axis, labelled=place == 0)
        title = f'x="{PANEL_WIDTH / 2}" y="{tall + 36}" text-anchor="middle"'
        parts += [f"<text {title}>{escape(x_axis.title)}</text>", "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _dot_row(series: Series, number: int, axis: Axis, labelled: bool) -> list[str]:
    y, point = ROW * (number + 0.5), series.points[0]
    x, colour = _x(axis, point.y), COLOURS[0]
    parts = [f'<text x="-12" y="{y + 4:.1f}" text-anchor="end">{escape(series.name)}</text>'] if labelled else []
    if point.low is not None and point.high is not None:
        ends = f'x1="{_x(axis, point.low):.1f}" x2="{_x(axis, point.high):.1f}"'
        parts.append(f'<line {ends} y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="2"/>')
    title = f"<title>{escape(series.name)}: {point.y:.3f}</title>"
    return [*parts, f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">{title}</circle>']


def _opening(width: float, height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" '
        f'font-family="system-ui, Helvetica, Arial, DejaVu Sans, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
    ]


def _title(text: str) -> str:
    return f'<text x="{PANEL_WIDTH / 2}" y="-14" text-anchor="middle" font-weight="600">{escape(text)}</text>'


def _x(axis: Axis, value: float) -> float:
    return 16 + axis.share(value) * (PANEL_WIDTH - 32)


def _y(axis: Axis, value: float) -> float:
    return PANEL_HEIGHT * (1 - axis.share(value))


def _axes(title: str, x_axis: Axis, y_axis: Axis, first: bool) -> list[str]:
    parts = [_title(title)]
    for value, label in y_axis.ticks:
        y = _y(y_axis, value)
        parts.append(f'<line x1="0" x2="{PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>')
        parts.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for value, label in x_axis.ticks:
        x = _x(x_axis, value)
        parts.append(f'<text x="{x:.1f}" y="{PANEL_HEIGHT + 18}" text-anchor="middle">{escape(label)}</text>')
    middle = f'x="{PANEL_WIDTH / 2}" y="{PANEL_HEIGHT + 36}" text-anchor="middle"'
    parts.append(f"<text {middle}>{escape(x_axis.title)}</text>")
    if first:
        place = f"translate(-54 {PANEL_HEIGHT / 2}) rotate(-90)"
        parts.append(f'<text transform="{place}" text-anchor="middle">{escape(y_axis.title)}</text>')
    return parts


def _style(number: int) -> tuple[str, str]:
    """Colour and dashes of the n-th series."""
    dashes = ' stroke-dasharray="6 3"' if number >= len(COLOURS) else ""
    return COLOURS[number % len(COLOURS)], dashes


def _curve(series: Series, number: int, x_axis: Axis, y_axis: Axis) -> list[str]:
    colour, dashes = _style(number)
    places = [(_x(x_axis, point.x), _y(y_axis, point.y)) for point in series.points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>']
    for point, (x, y) in zip(series.points, places, strict=True):
        if point.low is not None and point.high is not None:
            low, high = _y(y_axis, point.low), _y(y_axis, point.high)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>')
        title = f"{escape(series.name)} at {point.x:g}: {point.y:.3f}"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"><title>{title}</title></circle>')
    return parts


def _legend(names: Sequence[str], level_name: str, left: float) -> list[str]:
    parts = [f'<g transform="translate({left} {TOP})">']
    entries = [(name, *_style(number)) for number, name in enumerate(names)]
    entries.append((level_name, INK, ' stroke-dasharray="2 3"'))
    for place, (name, colour, dashes) in enumerate(entries):
        y = 10 + 20 * place
        parts.append(f'<line x1="0" x2="22" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts.append(f'<text x="30" y="{y + 4}">{escape(name)}</text>')
    return [*parts, "</g>"]
