"""Tables and curves of hand-made rows."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from xml.etree import ElementTree

from test_evaluation_statistics import row

from flowmm.evaluation.curves import budget_curves
from flowmm.evaluation.report import write_report
from flowmm.evaluation.summary import SummaryRow, summarise
from flowmm.evaluation.tables import HEADER, csv_table, markdown_table, text_table

SVG = "{http://www.w3.org/2000/svg}"


def summary() -> list[SummaryRow]:
    rows = [row("full", task, i, True, budget=1.0, kl=0.0) for task in "ab" for i in range(4)]
    rows += [
        row(method, task, i, i % 2 == 0, budget)
        for method in ("robust", "robust:merge=tangent")
        for budget in (0.1, 0.2)
        for task in "ab"
        for i in range(4)
    ]
    return summarise(rows)


def test_text_table_is_aligned() -> None:
    lines = text_table(summary()).splitlines()
    assert len(lines) == 1 + 5 * 3
    assert lines[0].split()[:4] == list(HEADER[:4])
    assert len({len(line) for line in lines}) == 1
    assert "50.0 [" in lines[4]


def test_markdown_table_marks_averages() -> None:
    lines = markdown_table(summary()).splitlines()
    assert {line.count("|") for line in lines} == {len(HEADER) + 1}
    assert sum("**average**" in line for line in lines) == 5


def test_csv_table_keeps_full_precision() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_table(summary()))))
    assert len(rows) == 15
    assert float(rows[3]["accuracy"]) == 0.5
    assert float(rows[3]["ci95_low"]) < 0.5 < float(rows[3]["ci95_high"])
    assert float(rows[3]["difference_to_full"]) == -0.5


def test_curves_have_a_point_per_method_and_budget() -> None:
    root = ElementTree.fromstring(budget_curves(summary()))
    assert len(root.findall(f".//{SVG}circle")) == 4
    assert len(root.findall(f".//{SVG}polyline")) == 2
    assert {"robust", "robust:merge=tangent", "aware"} <= {text.text for text in root.iter(f"{SVG}text")}


def test_curves_without_labels_show_the_divergence() -> None:
    rows = [row("robust", "fidelity", i, None, kl=0.3) for i in range(3)]
    root = ElementTree.fromstring(budget_curves(summarise(rows)))
    assert any("KL" in (text.text or "") for text in root.iter(f"{SVG}text"))


def test_report_files(tmp_path: Path) -> None:
    write_report(tmp_path, summary())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.svg",
        "summary.json",
        "table.csv",
        "table.md",
        "table.txt",
    ]
