"""Budget curves: average accuracy (or KL without labels) against the budget, one panel per protocol."""

from __future__ import annotations

from collections.abc import Sequence

from flowmm.evaluation.charts import PERCENT_AXIS, Axis, Panel, Point, Series, line_chart, linear_axis
from flowmm.evaluation.drawing import Drawing
from flowmm.evaluation.methods import FULL
from flowmm.evaluation.summary import AVERAGE, SummaryRow


def budget_curves(rows: Sequence[SummaryRow]) -> Drawing:
    """The chart of the rows of one run.

    Shows the averages over tasks, or the only task. Bars are 95 % intervals; the dashed line is the full cache.
    """
    shown = [row for row in rows if row.task == AVERAGE] or list(rows)
    labelled = all(row.accuracy is not None for row in shown)
    highest = max(row.kl for row in shown) * 1.05 or 1.0
    quantity = PERCENT_AXIS if labelled else linear_axis("KL to the full cache (nats)", highest)
    protocols = list(dict.fromkeys(row.protocol for row in shown))
    panels = [_panel(protocol, [row for row in shown if row.protocol == protocol]) for protocol in protocols]
    return line_chart(panels, budget_axis([row.budget for row in shown if row.method != FULL]), quantity, "full cache")


def budget_axis(budgets: Sequence[float]) -> Axis:
    """Spread by logarithm, with a tick at every measured budget."""
    ticks = tuple((budget, f"{100 * budget:g} %") for budget in sorted(set(budgets)) or [1.0])
    return Axis("KV budget", ticks, ticks[0][0], ticks[-1][0], logarithmic=True)


def _panel(title: str, rows: Sequence[SummaryRow]) -> Panel:
    methods = [name for name in dict.fromkeys(row.method for row in rows) if name != FULL]
    full = [_point(row).y for row in rows if row.method == FULL]
    series = [
        Series(name, tuple(_point(row) for row in sorted(rows, key=lambda row: row.budget) if row.method == name))
        for name in methods
    ]
    return Panel(title, tuple(series), full[0] if full else None)


def _point(row: SummaryRow) -> Point:
    low, high = row.ci95 or (None, None)
    return Point(row.budget, row.kl if row.accuracy is None else row.accuracy, low, high)
