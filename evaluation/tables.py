"""Result tables as text, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from flowmm.evaluation.statistics import Interval
from flowmm.evaluation.summary import AVERAGE, Difference, SummaryRow

HEADER = (
    "protocol", "budget", "method", "task", "n", "accuracy %", "to full", "KL", "top-1 %", "kept", "KiB",
)  # fmt: skip
_TEXT_COLUMNS = 4


def text_table(rows: Sequence[SummaryRow]) -> str:
    """Aligned columns, one line per row; numbers to the right."""
    cells = [list(HEADER), *_cells(rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    lines = []
    for line in cells:
        padded = [
            cell.ljust(width) if column < _TEXT_COLUMNS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip() + "\n")
    return "".join(lines)


def markdown_table(rows: Sequence[SummaryRow]) -> str:
    """A GitHub table; the averages stand out."""
    rule = ["---"] * _TEXT_COLUMNS + ["---:"] * (len(HEADER) - _TEXT_COLUMNS)
    lines = [list(HEADER), rule]
    for row, cells in zip(rows, _cells(rows), strict=True):
        lines.append([f"**{cell}**" for cell in cells] if row.task == AVERAGE else cells)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def csv_table(rows: Sequence[SummaryRow]) -> str:
    """Every field at full precision, intervals as two columns."""
    flat = [_split_intervals(row) for row in rows]
    names = list(dict.fromkeys(name for line in flat for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _split_intervals(row: SummaryRow) -> dict[str, object]:
    line: dict[str, object] = {}
    for name, value in row.to_dict().items():
        if name.endswith("ci95"):
            line[f"{name}_low"], line[f"{name}_high"] = value or (None, None)
        else:
            line[name] = value
    return line


def _cells(rows: Sequence[SummaryRow]) -> list[list[str]]:
    return [
        [
            row.protocol,
            f"{row.budget:g}",
            row.method,
            row.task,
            str(row.n),
            _accuracy(row.accuracy, row.ci95),
            _difference(row.to_full),
            f"{row.kl:.3f}",
            f"{100 * row.agreement:.1f}",
            f"{row.kept:.1f}",
            f"{row.bytes / 1024:.0f}",
        ]
        for row in rows
    ]


def _accuracy(accuracy: float | None, ci95: Interval | None) -> str:
    if accuracy is None or ci95 is None:
        return "-"
    return f"{100 * accuracy:.1f} [{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    low, high = difference.ci95
    return f"{100 * difference.mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
