"""Studies, comparisons and figures, on hand-made rows and on a tiny checkpoint."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_evaluation_statistics import row
from tiny_checkpoint import write_checkpoint

from flowmm.cli import main as flowmm_main
from flowmm.errors import InputError
from flowmm.evaluation import choices
from flowmm.evaluation.charts import COLOURS, Axis, Panel, Point, Series, dot_chart, line_chart, linear_axis
from flowmm.evaluation.comparison import ALL, Line, compare
from flowmm.evaluation.figures import DRAWN, draw_rho
from flowmm.evaluation.lab import Lab, cells_of, measure_studies, open_lab, split_variant
from flowmm.evaluation.methods import CONTROLS, FULL, parse_methods
from flowmm.evaluation.plan_kinds import FLOW_KINDS, PLAN_KINDS, plan_of_kind
from flowmm.evaluation.records import Row
from flowmm.evaluation.studies import STUDIES, Block, Study, around
from flowmm.models import load_model
from flowmm.plans import Plan, resolve_plan
from flowmm.profiler import load_calibration, profile

SVG = "{http://www.w3.org/2000/svg}"
SMALL = Study("small", "Small", "Does it run?", (Block(("robust", "robust:random_pivots")),), (0.1,), ("blind",))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plan_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model(str(checkpoint), device="cpu", dtype="fp32")
    plan = profile(model, list(load_calibration("pocket", limit=2)), source="pocket")
    target = tmp_path_factory.mktemp("plan") / "tiny.json"
    plan.save(target)
    return target


@pytest.fixture(scope="module")
def lab(checkpoint: Path, plan_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    runs = tmp_path_factory.mktemp("runs")
    return open_lab(model=str(checkpoint), plan=str(plan_file), runs=runs, split="validation", n=1, quiet=True)


def answers(right: list[bool], method: str, protocol: str = "blind", budget: float = 0.1) -> list[Row]:
    return [replace(row(method, "a", i, ok, budget), protocol=protocol) for i, ok in enumerate(right)]


def line_of(lines: list[Line], variant: str, protocol: str) -> Line:
    (found,) = [line for line in lines if (line.variant, line.protocol) == (variant, protocol)]
    return found


def test_every_study_names_real_methods_and_plans() -> None:
    figures = [study for study, _ in DRAWN.values()]
    for study in [*STUDIES.values(), *figures]:
        for method, kind, budget in cells_of(study):
            assert parse_methods(method, 0.25)[0].name == method
            assert kind in PLAN_KINDS
            assert 0 < budget <= 1


def test_variants_name_a_method_and_a_kind_of_plan() -> None:
    assert split_variant("robust:n_sink=0") == ("robust:n_sink=0", "uniform")
    assert split_variant("paper:theta=0.1@online") == ("paper:theta=0.1", "online")
    assert around("robust", "n_sink=0").variants == ("robust", "robust:n_sink=0")
    assert around("robust:merge=evict", "n_sink=0").variants[1] == "robust:merge=evict,n_sink=0"


def test_differences_are_paired_by_case() -> None:
    right, worse = [True, True, False, True], [True, False, False, False]
    lines = compare({"ours": answers(right, "ours"), "theirs": answers(worse, "theirs")}, "ours")
    reference, other = line_of(lines, "ours", "blind"), line_of(lines, "theirs", "blind")
    assert (reference.accuracy, reference.difference) == (0.75, None)
    assert other.difference == -0.5
    assert other.difference_low is not None
    assert other.difference_low < -0.5
    assert other.n == 4


def test_all_protocols_count_alike_and_a_case_once() -> None:
    rows = answers([True, False], "ours", "aware") + answers([True, True], "ours", "blind")
    average = line_of(compare({"ours": rows}, "ours"), "ours", ALL)
    assert (average.accuracy, average.n) == (0.75, 2)


def test_the_full_cache_is_a_reference_at_every_budget() -> None:
    measured = {FULL: answers([True, True], FULL, budget=1.0), "ours": answers([True, False], "ours")}
    assert line_of(compare(measured, FULL), "ours", "blind").difference == -0.5


def test_kinds_of_plan_keep_the_architecture(plan_file: Path) -> None:
    plan = Plan.load(plan_file)
    assert {layer.mode for layer in plan_of_kind("online", plan).layers} == {"online"}
    for kind in PLAN_KINDS:
        made = plan_of_kind(kind, plan)
        assert made.model == plan.model
        assert kind == "measured" or all(layer.curve is None for layer in made.layers)
    with pytest.raises(InputError, match="best"):
        plan_of_kind("best", plan)


@pytest.mark.parametrize("preset", ["robust", "paper", "aware", "reuse"])
def test_controls_keep_exactly_the_same_number_of_entries(lab: Lab, preset: str) -> None:
    methods = (preset, *(f"{preset}:{control}" for control in CONTROLS))
    study = Study("controls", "", "", (Block(methods),), (0.1,), ("blind",))
    (lines,) = measure_studies(lab, [study])["controls"]
    assert len({(line.kept, line.tokens) for line in lines}) == 1
    assert {line.variant for line in lines} == set(methods)


def test_a_study_is_measured_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure_studies(lab, [SMALL])
    monkeypatch.setattr("flowmm.evaluation.runner.prefill", lambda *_: pytest.fail("measured again"))
    assert measure_studies(lab, [SMALL]) == first


def test_command_line_renews_a_section(
    lab: Lab, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(STUDIES, "small", SMALL)
    document = tmp_path / "choices.md"
    document.write_text("# Before\n<!-- study:small -->\nold\n<!-- /study -->\nafter\n", encoding="utf-8")
    command = ["small", "--n", "1", "--model", lab.source, "--plan", str(plan_file), "--runs", str(lab.runs), "-q"]
    assert choices.main([*command, "--document", str(document), "--csv", str(tmp_path)]) == 0
    text = document.read_text(encoding="utf-8")
    assert text.startswith("# Before\n<!-- study:small -->\n`python -m")
    assert text.endswith("<!-- /study -->\nafter\n")
    assert "old" not in text
    assert "| `robust:random_pivots` | 10 % |" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "small.csv").open(encoding="utf-8")))
    assert {line["weights"] for line in rows} == {lab.weights}
    assert choices.main(["chess"]) == 2
    assert "chess" in capsys.readouterr().err


def test_rho_is_drawn_with_every_estimator(plan_file: Path) -> None:
    plan = Plan.load(plan_file)
    figure = draw_rho(plan)
    root = ElementTree.fromstring(figure.drawing.svg())
    assert len([line for line in root.findall(f".//{SVG}polyline") if len(line.get("points", "").split()) > 2]) == (
        len(FLOW_KINDS) - 1
    )
    assert len(figure.table.splitlines()) == 1 + len(plan.layers) * len(FLOW_KINDS)
    with pytest.raises(InputError, match="no rho"):
        draw_rho(Plan.load(resolve_plan("qwen25vl")))


def test_figure_command_writes_svg_png_and_csv(
    plan_file: Path, lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model", lab.source, "--plan", str(plan_file), "--out", str(tmp_path), "-q"]
    assert flowmm_main(["figure", "rho", *where]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"rho.svg", "rho.png", "rho.csv"}
    assert capsys.readouterr().out.splitlines()[0].endswith("rho.svg")


def test_drawings_show_every_variant() -> None:
    for study, drawing in DRAWN.values():
        measured = {
            variant: [
                found
                for protocol in study.protocols
                for budget in ((1.0,) if variant == FULL else study.budgets)
                for found in answers([True, False], variant, protocol, budget)
            ]
            for variant in study.blocks[0].variants
        }
        root = ElementTree.fromstring(drawing(study, compare(measured, FULL)).svg())
        compressed = (len(study.blocks[0].variants) - 1) * len(study.budgets) * len(study.protocols)
        assert len(root.findall(f".//{SVG}circle")) == compressed


def test_a_ninth_line_is_dashed_and_axes_hold_their_ends() -> None:
    series = tuple(Series(f"line {i}", (Point(0.1, 0.5), Point(0.2, 0.6, 0.5, 0.7))) for i in range(len(COLOURS) + 1))
    axis = Axis("budget", ((0.1, "10 %"), (0.2, "20 %")), 0.1, 0.2, logarithmic=True)
    assert (axis.share(0.1), axis.share(0.2)) == (0.0, 1.0)
    root = ElementTree.fromstring(line_chart([Panel("p", series, 0.9)], axis, linear_axis("share", 1.0), "level").svg())
    curves = [line for line in root.findall(f".//{SVG}polyline") if line.get("stroke-width") == "2"][: len(series)]
    assert [line.get("stroke-dasharray") for line in curves] == [None] * len(COLOURS) + ["6 3"]
    dots = ElementTree.fromstring(dot_chart([Panel("p", series)], linear_axis("accuracy", 1.0)).svg())
    assert len(dots.findall(f".//{SVG}circle")) == len(series)
