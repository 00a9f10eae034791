"""Budget curves as SVG: average accuracy (or KL without labels) against the budget, one panel per protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from flowmm.evaluation.methods import FULL
from flowmm.evaluation.summary import AVERAGE, SummaryRow

PANEL_WIDTH, PANEL_HEIGHT = 340, 260
LEFT, TOP, GAP, BOTTOM = 68, 40, 62, 44
LEGEND_WIDTH = 170
# Distinguishable without colour vision (Okabe and Ito), dark enough on white; more methods start again, dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#333333")
INK, FAINT = "#222222", "#d9d9d9"


@dataclass(frozen=True)
class Scale:
    """Where values lie in a panel; budgets are spread by their logarithm."""

    budgets: Sequence[float]
    low: float
    high: float

    def x(self, budget: float) -> float:
        first, last = math.log(min(self.budgets)), math.log(max(self.budgets))
        share = 0.5 if first == last else (math.log(budget) - first) / (last - first)
        return 16 + share * (PANEL_WIDTH - 32)

    def y(self, value: float) -> float:
        return PANEL_HEIGHT * (1 - (value - self.low) / (self.high - self.low))


def budget_curves(rows: Sequence[SummaryRow]) -> str:
    """One SVG document for the rows of one run.

    Shows the averages over tasks, or the only task. Bars are 95 % intervals; the dashed line is the full cache.
    """
    shown = [row for row in rows if row.task == AVERAGE] or list(rows)
    labelled = all(row.accuracy is not None for row in shown)
    protocols = list(dict.fromkeys(row.protocol for row in shown))
    methods = [name for name in dict.fromkeys(row.method for row in shown) if name != FULL]
    budgets = sorted({row.budget for row in shown if row.method != FULL}) or [1.0]
    highest = 1.0 if labelled else max(row.kl for row in shown) * 1.05 or 1.0
    scale = Scale(budgets, 0.0, highest)
    width = LEFT + len(protocols) * (PANEL_WIDTH + GAP) + LEGEND_WIDTH
    height = TOP + PANEL_HEIGHT + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, Helvetica, Arial, DejaVu Sans, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for place, protocol in enumerate(protocols):
        panel = [row for row in shown if row.protocol == protocol]
        left = LEFT + place * (PANEL_WIDTH + GAP)
        parts.append(f'<g transform="translate({left} {TOP})">')
        parts += _axes(scale, protocol, "accuracy" if labelled else "KL to the full cache (nats)", first=place == 0)
        parts += _full_line(scale, [row for row in panel if row.method == FULL])
        for number, method in enumerate(methods):
            # Neighbouring intervals would hide each other.
            aside = (number - (len(methods) - 1) / 2) * min(4.0, 24 / len(methods))
            parts.append(f'<g transform="translate({aside:.1f} 0)">')
            parts += [*_curve(scale, [row for row in panel if row.method == method], number), "</g>"]
        parts.append("</g>")
    parts += _legend(methods, LEFT + len(protocols) * (PANEL_WIDTH + GAP) - 30)
    return "\n".join([*parts, "</svg>", ""])


def _axes(scale: Scale, title: str, quantity: str, first: bool) -> list[str]:
    parts = [f'<text x="{PANEL_WIDTH / 2}" y="-14" text-anchor="middle" font-weight="600">{escape(title)}</text>']
    for step in range(6):
        value = scale.low + step * (scale.high - scale.low) / 5
        label = f"{100 * value:.0f} %" if quantity == "accuracy" else f"{value:.2g}"
        y = scale.y(value)
        parts.append(f'<line x1="0" x2="{PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>')
        parts.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for budget in scale.budgets:
        x = scale.x(budget)
        parts.append(f'<text x="{x:.1f}" y="{PANEL_HEIGHT + 18}" text-anchor="middle">{100 * budget:g} %</text>')
    middle = f'x="{PANEL_WIDTH / 2}" y="{PANEL_HEIGHT + 36}" text-anchor="middle"'
    parts.append(f"<text {middle}>KV budget</text>")
    if first:
        place = f"translate(-54 {PANEL_HEIGHT / 2}) rotate(-90)"
        parts.append(f'<text transform="{place}" text-anchor="middle">{quantity}</text>')
    return parts


def _full_line(scale: Scale, rows: Sequence[SummaryRow]) -> list[str]:
    return [
        f'<line x1="0" x2="{PANEL_WIDTH}" y1="{scale.y(_value(row)):.1f}" y2="{scale.y(_value(row)):.1f}" '
        f'stroke="{INK}" stroke-dasharray="2 3"/>'
        for row in rows
    ]


def _value(row: SummaryRow) -> float:
    return row.kl if row.accuracy is None else row.accuracy


def _style(number: int) -> tuple[str, str]:
    """Colour and dashes of the n-th method."""
    dashes = ' stroke-dasharray="6 3"' if number >= len(COLOURS) else ""
    return COLOURS[number % len(COLOURS)], dashes


def _curve(scale: Scale, rows: Sequence[SummaryRow], number: int) -> list[str]:
    colour, dashes = _style(number)
    rows = sorted(rows, key=lambda row: row.budget)
    points = [(scale.x(row.budget), scale.y(_value(row))) for row in rows]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>']
    for row, (x, y) in zip(rows, points, strict=True):
        if row.ci95 is not None:
            low, high = (scale.y(end) for end in row.ci95)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>')
        title = f"{escape(row.method)} at {100 * row.budget:g} %: {_value(row):.3f}"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"><title>{title}</title></circle>')
    return parts


def _legend(methods: Sequence[str], left: float) -> list[str]:
    parts = [f'<g transform="translate({left} {TOP})">']
    entries = [(method, *_style(number)) for number, method in enumerate(methods)]
    entries.append(("full cache", INK, ' stroke-dasharray="2 3"'))
    for place, (name, colour, dashes) in enumerate(entries):
        y = 10 + 20 * place
        parts.append(f'<line x1="0" x2="22" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts.append(f'<text x="30" y="{y + 4}">{escape(name)}</text>')
    return [*parts, "</g>"]
