"""Everything a finished grid leaves in its directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmm.evaluation.curves import budget_curves
from flowmm.evaluation.leads import Lead
from flowmm.evaluation.summary import SummaryRow
from flowmm.evaluation.tables import csv_table, lead_markdown, lead_text, markdown_table, text_table
from flowmm.plans.files import write_atomic


@dataclass(frozen=True)
class Results:
    """Numbers of one grid; `leads` compares one method with each other, where that was asked for."""

    rows: Sequence[SummaryRow]
    leads: Sequence[Lead] = ()

    def as_json(self) -> dict[str, Any]:
        """``{"rows": [...]}``, see :meth:`SummaryRow.to_dict`, and ``leads`` where there are any."""
        leads = {"leads": [lead.to_dict() for lead in self.leads]} if self.leads else {}
        return {"rows": [row.to_dict() for row in self.rows], **leads}

    def as_text(self) -> str:
        """The tables for people."""
        return "\n".join([text_table(self.rows), *([lead_text(self.leads)] if self.leads else [])])


def write_report(directory: Path, results: Results) -> None:
    """Write ``summary.json``, ``table`` as ``.txt``, ``.csv`` and ``.md``, ``curves`` as ``.svg`` and ``.png``; a
    comparison with a reference, where there is one, as ``leads.txt``, ``leads.csv`` and ``leads.md``.

    Raises:
        InputError: the directory cannot be written.
    """
    write_atomic(directory / "summary.json", json.dumps(results.as_json(), indent=2, ensure_ascii=False) + "\n")
    write_atomic(directory / "table.txt", text_table(results.rows))
    write_atomic(directory / "table.csv", csv_table(results.rows))
    write_atomic(directory / "table.md", markdown_table(results.rows))
    curves = budget_curves(results.rows)
    write_atomic(directory / "curves.svg", curves.svg())
    write_atomic(directory / "curves.png", curves.png())
    if results.leads:
        write_atomic(directory / "leads.txt", lead_text(results.leads))
        write_atomic(directory / "leads.csv", csv_table(results.leads))
        write_atomic(directory / "leads.md", lead_markdown(results.leads))
