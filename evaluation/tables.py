"""Result tables as text, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Container, Mapping, Sequence
from typing import Any

from flowmm.evaluation.leads import Lead
from flowmm.evaluation.statistics import Interval
from flowmm.evaluation.summary import AVERAGE, Difference, SummaryRow

HEADER = (
    "protocol", "budget", "method", "task", "n", "accuracy %", "to full", "KL", "top-1 %", "attention error", "kept",
    "KiB",
)  # fmt: skip
LEAD_HEADER = ("protocol", "budget", "reference", "method", "n", "reference is", "method is", "difference", "verdict")
MISSING = "-"

Cells = list[list[str]]


def text_table(rows: Sequence[SummaryRow]) -> str:
    """Aligned columns, one line per row; numbers to the right. Columns without any value are left out."""
    return _aligned(_filled([list(HEADER), *map(_cells, rows)]), left={"protocol", "budget", "method", "task"})


def markdown_table(rows: Sequence[SummaryRow]) -> str:
    """A GitHub table; the averages stand out. Columns without any value are left out."""
    cells = [
        [f"**{cell}**" if cell != MISSING else cell for cell in _cells(row)] if row.task == AVERAGE else _cells(row)
        for row in rows
    ]
    return _markdown(_filled([list(HEADER), *cells]), left={"protocol", "budget", "method", "task"})


def lead_text(leads: Sequence[Lead]) -> str:
    """The reference against each method, one line each: its value, the method's, and the paired difference."""
    return _aligned([list(LEAD_HEADER), *map(_lead_cells, leads)], left=_LEAD_LEFT)


def lead_markdown(leads: Sequence[Lead]) -> str:
    """:func:`lead_text` as a GitHub table."""
    return _markdown([list(LEAD_HEADER), *map(_lead_cells, leads)], left=_LEAD_LEFT)


_LEAD_LEFT = {"protocol", "budget", "reference", "method", "verdict"}


def _filled(cells: Cells) -> Cells:
    """The table without the columns in which every row lacks a value."""
    shown = [column for column in range(len(cells[0])) if any(row[column] != MISSING for row in cells[1:])]
    return [[row[column] for column in shown] for row in cells]


def _aligned(cells: Cells, left: Container[str]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if title in left else cell.rjust(width)
            for title, cell, width in zip(cells[0], row, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip() + "\n")
    return "".join(lines)


def _markdown(cells: Cells, left: Container[str]) -> str:
    rule = ["---" if title in left else "---:" for title in cells[0]]
    return "".join("| " + " | ".join(row) + " |\n" for row in [cells[0], rule, *cells[1:]])


def csv_table(rows: Sequence[SummaryRow] | Sequence[Lead]) -> str:
    """Every field at full precision, intervals as two columns, one column per layer."""
    flat = [_flattened(row.to_dict()) for row in rows]
    names = list(dict.fromkeys(name for line in flat for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flattened(fields: Mapping[str, Any]) -> dict[str, object]:
    line: dict[str, object] = {}
    for name, value in fields.items():
        if name.endswith("ci95"):
            line[f"{name}_low"], line[f"{name}_high"] = value or (None, None)
        elif name == "attention_error":
            line |= {f"{name}_layer_{layer}": error for layer, error in enumerate(value or ())}
        else:
            line[name] = value
    return line


def _cells(row: SummaryRow) -> list[str]:
    return [
        row.protocol,
        f"{row.budget:g}",
        row.method,
        row.task,
        str(row.n),
        _accuracy(row.accuracy, row.ci95),
        _difference(row.to_full),
        f"{row.kl:.3f}",
        f"{100 * row.agreement:.1f}",
        _mean_error(row.attention_error),
        f"{row.kept:.1f}",
        f"{row.bytes / 1024:.0f}",
    ]


def _accuracy(accuracy: float | None, ci95: Interval | None) -> str:
    if accuracy is None or ci95 is None:
        return MISSING
    return f"{100 * accuracy:.1f} [{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]"


def _difference(difference: Difference | None) -> str:
    return MISSING if difference is None else _change(difference.mean, difference.ci95, 100, 1)


def _mean_error(errors: Sequence[float] | None) -> str:
    """Mean over layers."""
    return MISSING if errors is None else f"{sum(errors) / len(errors):.3f}"


def _lead_cells(lead: Lead) -> list[str]:
    scale, digits, unit = (100, 1, " %") if lead.quantity == "accuracy" else (1, 3, " nats")
    return [
        lead.protocol,
        f"{lead.budget:g}",
        lead.reference,
        lead.method,
        str(lead.n),
        f"{scale * lead.reference_value:.{digits}f}{unit}",
        f"{scale * lead.method_value:.{digits}f}{unit}",
        _change(lead.difference, lead.ci95, scale, digits),
        lead.verdict,
    ]


def _change(mean: float, ci95: Interval, scale: int, digits: int) -> str:
    numbers = [f"{scale * number:+.{digits}f}" for number in (mean, *ci95)]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"
