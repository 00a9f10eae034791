"""Everything a finished grid leaves in its directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowmm.evaluation.curves import budget_curves
from flowmm.evaluation.summary import SummaryRow
from flowmm.evaluation.tables import csv_table, markdown_table, text_table
from flowmm.plans.files import write_atomic


def as_json(rows: Sequence[SummaryRow]) -> dict[str, Any]:
    """``{"rows": [...]}``, see :meth:`SummaryRow.to_dict`."""
    return {"rows": [row.to_dict() for row in rows]}


def write_report(directory: Path, rows: Sequence[SummaryRow]) -> None:
    """Write ``summary.json``, ``table.txt``, ``table.csv``, ``table.md`` and ``curves.svg``.

    Raises:
        InputError: the directory cannot be written.
    """
    write_atomic(directory / "summary.json", json.dumps(as_json(rows), indent=2, ensure_ascii=False) + "\n")
    write_atomic(directory / "table.txt", text_table(rows))
    write_atomic(directory / "table.csv", csv_table(rows))
    write_atomic(directory / "table.md", markdown_table(rows))
    write_atomic(directory / "curves.svg", budget_curves(rows))
