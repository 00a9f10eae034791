"""Tables and curves of hand-made rows."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from test_evaluation_statistics import row

from flowmm.evaluation.curves import budget_curves
from flowmm.evaluation.leads import compare_with_reference
from flowmm.evaluation.report import Results, write_report
from flowmm.evaluation.summary import SummaryRow, summarise
from flowmm.evaluation.tables import (
    HEADER,
    LEAD_HEADER,
    csv_table,
    lead_markdown,
    lead_text,
    markdown_table,
    text_table,
)

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
    assert "attention error" not in lines[0]
    assert len({len(line) for line in lines}) == 1
    assert "50.0 [" in lines[4]


def test_markdown_table_marks_averages() -> None:
    lines = markdown_table(summary()).splitlines()
    assert {line.count("|") for line in lines} == {len(HEADER)}, "without the attention error, which labelled rows lack"
    assert sum("**average**" in line for line in lines) == 5


def test_csv_table_keeps_full_precision() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_table(summary()))))
    assert len(rows) == 15
    assert float(rows[3]["accuracy"]) == 0.5
    assert float(rows[3]["ci95_low"]) < 0.5 < float(rows[3]["ci95_high"])
    assert float(rows[3]["difference_to_full"]) == -0.5


def test_curves_have_a_point_per_method_and_budget() -> None:
    root = ElementTree.fromstring(budget_curves(summary()).svg())
    assert len(root.findall(f".//{SVG}circle")) == 4
    strokes = [line for line in root.findall(f".//{SVG}polyline") if line.get("stroke-width") == "2"]
    assert len(strokes) == 2 * 2 + 1, "two curves, and the legend with the full cache"
    assert {"robust", "robust:merge=tangent", "aware"} <= {text.text for text in root.iter(f"{SVG}text")}


def test_curves_without_labels_show_the_divergence() -> None:
    rows = [row("robust", "fidelity", i, None, kl=0.3) for i in range(3)]
    root = ElementTree.fromstring(budget_curves(summarise(rows)).svg())
    assert any("KL" in (text.text or "") for text in root.iter(f"{SVG}text"))


def test_tables_of_prompts_without_labels_show_the_attention_error() -> None:
    lines = summarise([replace(row("robust", "fidelity", 0, None), attention_error=(0.1, 0.3))])
    assert text_table(lines).splitlines()[0].split()[-4:] == ["attention", "error", "kept", "KiB"]
    assert "0.200" in text_table(lines).splitlines()[1]
    (flat,) = csv.DictReader(io.StringIO(csv_table(lines)))
    assert (flat["attention_error_layer_0"], flat["attention_error_layer_1"]) == ("0.1", "0.3")
    assert "accuracy" not in text_table(lines)


def test_comparison_tables_have_a_line_per_method_and_budget() -> None:
    rows = [
        replace(row(method, "a", i, method == "ours"), digest=method) for method in ("ours", "theirs") for i in range(8)
    ]
    leads = compare_with_reference(rows, "ours")
    (line,) = lead_text(leads).splitlines()[1:]
    assert "100.0 %" in line
    assert "+100.0 [+100.0, +100.0]" in line
    assert line.endswith("ahead")
    assert lead_markdown(leads).splitlines()[2].count("|") == len(LEAD_HEADER) + 1
    (flat,) = csv.DictReader(io.StringIO(csv_table(leads)))
    assert (flat["difference"], flat["ci95_low"], flat["verdict"]) == ("1.0", "1.0", "ahead")


def test_report_files(tmp_path: Path) -> None:
    write_report(tmp_path, Results(summary()))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.png",
        "curves.svg",
        "summary.json",
        "table.csv",
        "table.md",
        "table.txt",
    ]
