"""What counts as drift between two plans, and how it is told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from flowmm.errors import InputError
from flowmm.plans import Plan, PlanDiff, diff
from flowmm.plans.canonical import canonical_text
from flowmm.plans.diff import KINDS, describe
from flowmm.plans.diff_junit import junit
from flowmm.plans.diff_render import append_github_files, github, markdown, summary, text, to_json
from flowmm.plans.diff_statistics import Moments, holm, paired_p, student_p, welch_p

OLD = Plan.load(Path(__file__).with_name("test_plans_sample.json"))


def edited(change: Callable[[dict[str, Any]], object]) -> Plan:
    values = OLD.as_json()
    change(values)
    return Plan.loads(canonical_text(values))


def rho(layer: int, mean: float) -> Plan:
    return edited(lambda p: p["layers"][layer]["rho"].update(mean=mean))


def lines(difference: PlanDiff) -> list[str]:
    return [describe(change, difference.tol) for change in difference.changes]


def test_same_plan() -> None:
    difference = diff(OLD, OLD)
    assert not difference.drifted
    assert difference.changes == ()
    assert summary(difference) == "no change"


def test_what_is_not_compared() -> None:
    other = {"created_at": "2027-01-01T00:00:00Z", "flowmm_version": "9", "note": "n", "environment": None}
    assert diff(OLD, edited(lambda p: p.update(other))).changes == ()


def test_rho_at_the_tolerance_is_not_drift() -> None:
    # 0.432 - 0.412 is above 0.02 in binary floating point.
    at, above = (diff(OLD, rho(4, mean), alpha=1) for mean in (0.432, 0.43201))
    assert len(at.changes) == 1
    assert not at.drifted
    assert above.drifted
    assert above.max_abs_rho == pytest.approx(0.02001)


def flipped(layer: int, mode: str, mean: float, margin: float) -> Plan:
    return edited(
        lambda p: (
            p["layers"][layer].update(mode=mode),
            p["layers"][layer]["rho"].update(mean=mean, margin=margin),
        )
    )


def test_mode_that_flips_across_a_clear_margin_is_drift() -> None:
    new = flipped(5, "intra", 0.2, 1.43)
    assert [(change.kind, change.layer) for change in diff(OLD, new).drift] == [("mode", 5), ("rho", 5)]
    assert [change.kind for change in diff(OLD, new, tol=0.2).drift] == ["mode"]
    assert not diff(OLD, new, tol=0.2, fail_on={"rho"}).drifted


def test_mode_that_flips_within_noise_is_unsettled() -> None:
    # Layer 2 lies 0.19 standard deviations below theta: 32 prompts cannot tell its mode.
    difference = diff(OLD, flipped(2, "cross", 0.251, 0.04))
    assert not difference.drifted
    assert [change.layer for change in difference.unsettled] == [2]
    assert "layer 2 mode intra → cross (unsettled: too close to the threshold to tell)" in lines(difference)
    assert "1 mode unsettled" in summary(difference)
    assert diff(OLD, flipped(2, "cross", 0.251, 0.04), alpha=1).drifted
    line = next(n for n, text in enumerate(OLD.dumps().splitlines(), start=1) if '"index": 2' in text)
    warning = f"::warning file=x.json,line={line},title=flowmm drift::layer 2 mode"
    assert warning in github(difference, "x.json", OLD.dumps())


def test_mode_that_a_person_changed_is_never_noise() -> None:
    new = edited(lambda p: p["layers"][2].update(mode="cross", forced=True))
    assert [change.path[-1] for change in diff(OLD, new).drift] == ["mode", "forced"]


def test_change_that_chance_could_make_is_not_drift() -> None:
    difference = diff(OLD, rho(4, 0.434))
    assert not difference.drifted
    assert lines(difference) == ["layer 4 rho 0.412 → 0.434 (Δ +0.022, tol 0.02, p 0.05, could be chance)"]


def test_same_prompts_make_small_changes_clear() -> None:
    still = Moments(0.0, 0.0, 32)
    moved = [still] * 4 + [Moments(0.022, 0.01, 32), still]
    difference = diff(OLD, rho(4, 0.434), paired=moved)
    assert difference.drifted
    assert difference.paired
    assert "paired t-test, same prompts, Holm over 6 layers" in text(difference)


def test_single_prompts_are_judged_by_tolerance() -> None:
    new = edited(lambda p: p["layers"][4]["rho"].update(mean=0.43, n=1))
    assert diff(OLD, new, tol=0.01).drifted
    assert not diff(OLD, new).drifted


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"attn_implementation": "eager"}, {"source": "a/copy"}])
def test_what_moves_rho_by_rounding_is_told_but_no_drift(change: dict[str, Any]) -> None:
    difference = diff(OLD, edited(lambda p: p["model"].update(change)))
    assert [found.kind for found in difference.changes] == ["model"]
    assert not difference.drifted


def test_library_versions_are_told_but_no_drift() -> None:
    difference = diff(OLD, edited(lambda p: p["environment"].update(torch="99.0")), fail_on=KINDS)
    assert [found.path for found in difference.changes] == [("environment", "torch")]
    assert not difference.drifted


def test_rho_of_one_side_only_cannot_be_compared() -> None:
    new = edited(lambda p: p["layers"][2].update(mode="online", rho=None))
    assert {change.kind for change in diff(OLD, new).drift} == {"mode", "rho"}
    assert "layer 2 rho 0.245 → none" in lines(diff(OLD, new))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("model", lambda p: p["model"].update(weights_sha256="e" * 64)),
        ("method", lambda p: p["method"].update(merge="evict")),
        ("data", lambda p: p["calibration"].update(seed=1)),
        ("data", lambda p: p["calibration"]["tokens"].update(total_max=700)),
        ("data", lambda p: p.update(calibration=None)),
        ("mode", lambda p: p["layers"][0].update(forced=True)),
    ],
)
def test_each_kind_is_drift_when_asked_for(kind: str, change: Callable[[dict[str, Any]], object]) -> None:
    new = edited(change)
    assert [found.kind for found in diff(OLD, new).changes] == [kind]
    assert diff(OLD, new).drifted == (kind != "data")
    assert diff(OLD, new, fail_on={kind}).drifted
    assert not diff(OLD, new, fail_on=set()).drifted


def test_budget_of_a_layer_is_method() -> None:
    new = edited(lambda p: (p["layers"][0].update(budget=0.25), p["layers"][1].update(budget=0.15)))
    assert [(change.kind, change.layer) for change in diff(OLD, new).drift] == [("method", 0), ("method", 1)]
    assert not diff(OLD, new, tol=0.05).drifted


def test_other_number_of_layers() -> None:
    new = edited(lambda p: (p["layers"].pop(), p["model"].update(num_layers=5)))
    assert lines(diff(OLD, new)) == ["model.num_layers 6 → 5"]
    assert diff(OLD, new).drifted


@pytest.mark.parametrize("tol", [-0.1, 1.5, float("nan")])
def test_tolerance_out_of_range(tol: float) -> None:
    with pytest.raises(InputError, match="tolerance"):
        diff(OLD, OLD, tol)


def test_unknown_kind() -> None:
    with pytest.raises(InputError, match="strategy: expected some of mode"):
        diff(OLD, OLD, fail_on={"strategy"})


def test_text_marks_drift() -> None:
    new = edited(lambda p: (p["layers"][4]["rho"].update(mean=0.371), p["layers"][0]["rho"].update(mean=0.19)))
    report = text(diff(OLD, new))
    assert "drift: 1 of 2 changes count as drift, 1 layer moved, largest rho change 0.041" in report
    assert "  ! layer 4 rho 0.412 → 0.371 (Δ -0.041, tol 0.02, p 2e-05)\n" in report
    assert "    layer 0 rho 0.18 → 0.19 (Δ +0.01, tol 0.02, p 0.2)\n" in report


def test_json_report() -> None:
    report = json.loads(to_json(diff(OLD, rho(4, 0.371))))
    assert (report["test"], report["alpha"]) == ("welch", 0.01)
    assert report["changes"][0].pop("p") == pytest.approx(6 * 3.3e-6, rel=0.2)
    assert report["drifted"] is True
    assert report["changes"] == [
        {
            "kind": "rho",
            "path": "layers[4].rho.mean",
            "layer": 4,
            "old": 0.412,
            "new": 0.371,
            "delta": -0.041,
            "drift": True,
            "unsettled": False,
        }
    ]


def test_markdown_has_no_markup_from_a_plan() -> None:
    new = edited(lambda p: p["model"].update(architecture="a|b<img>`[x]"))
    table = [line for line in markdown(diff(OLD, new)).splitlines() if line.startswith("| yes")]
    assert table == [
        "| yes | model | model.architecture Qwen2\\_5\\_VLForConditionalGeneration → a\\|b&lt;img>\\`\\[x\\] |"
    ]


def test_github_points_at_the_line_of_the_layer() -> None:
    new = rho(4, 0.371)
    for content in (new.dumps(), "\n\n" + new.dumps().replace("\n", "\r\n")):
        line = next(number for number, row in enumerate(content.splitlines(), 1) if '"index": 4' in row)
        expected = f"::error file=plans/x.json,line={line},title=flowmm drift::layer 4 rho 0.412 → 0.371 "
        assert github(diff(OLD, new), "plans/x.json", content).startswith(expected)


def test_github_escapes() -> None:
    new = edited(lambda p: p["model"].update(architecture="50%::error"))
    command = github(diff(OLD, new), "a,b:c%.json", new.dumps())
    assert command.startswith("::error file=a%2Cb%3Ac%25.json,line=9,")
    assert "→ 50%25::error\n" in command


def test_github_gathers_what_would_not_be_shown() -> None:
    new = edited(
        lambda p: [
            layer["rho"].update(mean=1.0, q95=1.0, margin=9.0) or layer.update(mode="cross") for layer in p["layers"]
        ]
    )
    commands = github(diff(OLD, new, alpha=1), "x.json", new.dumps()).splitlines()
    assert len(commands) == 8
    assert "2 more:%0A" in commands[-1]


def test_github_without_drift_is_a_notice() -> None:
    assert github(diff(OLD, OLD), "x.json", OLD.dumps()).startswith("::notice file=x.json,line=1,")


@pytest.mark.parametrize("alpha", [0.0, 1.5, float("nan")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha"):
        diff(OLD, OLD, alpha=alpha)


def cases(difference: PlanDiff) -> dict[str, ElementTree.Element]:
    return {case.get("name", ""): case for case in ElementTree.fromstring(junit(difference)).iter("testcase")}


def test_junit_has_a_case_per_layer_and_kind() -> None:
    new = edited(
        lambda p: (
            p["layers"][4]["rho"].update(mean=0.371),
            p["calibration"].update(seed=1),
            p["model"].update(architecture="<&\ufffe"),
        )
    )
    found = cases(diff(OLD, new))
    assert len(found) == 3 + 6 * 3
    assert {name for name, case in found.items() if case.find("failure") is not None} == {"layer[4].rho", "model"}
    assert {name for name, case in found.items() if case.find("skipped") is not None} == {"data"}
    assert found["model"].findtext("failure") == "model.architecture Qwen2_5_VLForConditionalGeneration → <&?"
    suite = ElementTree.fromstring(junit(diff(OLD, new))).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("21", "2", "1")


def test_junit_skips_an_unsettled_mode() -> None:
    case = cases(diff(OLD, flipped(2, "cross", 0.251, 0.04)))["layer[2].mode"]
    assert [child.tag for child in case] == ["skipped"]


def test_github_files_are_appended_to(tmp_path: Path) -> None:
    summary_file, outputs = tmp_path / "summary.md", tmp_path / "outputs"
    outputs.write_text("before=1\n", encoding="utf-8")
    environment = {"GITHUB_STEP_SUMMARY": str(summary_file), "GITHUB_OUTPUT": str(outputs)}
    append_github_files(diff(OLD, rho(4, 0.371)), environment)
    append_github_files(diff(OLD, OLD), {})
    assert outputs.read_text(encoding="utf-8") == "before=1\ndrift=true\nmax_abs_rho=0.041\n"
    assert summary_file.read_text(encoding="utf-8").startswith("### flowmm diff")
    with pytest.raises(InputError, match="GITHUB_OUTPUT"):
        append_github_files(diff(OLD, OLD), {"GITHUB_OUTPUT": str(tmp_path)})


@pytest.mark.parametrize("freedom", [1, 2, 5, 31, 126.4, 1e5])
@pytest.mark.parametrize("t", [0, 0.01, 0.7, 2, 5, 12])
def test_student_p_is_scipys(freedom: float, t: float) -> None:
    assert student_p(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-6)


def test_welch_and_paired_are_scipys() -> None:
    noise = np.random.default_rng(0)
    a, b = noise.normal(0.4, 0.03, 20), noise.normal(0.42, 0.05, 20)
    first, second = (Moments(x.mean(), x.std(ddof=1), len(x)) for x in (a, b))
    assert welch_p(first, second) == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)
    change = Moments((b - a).mean(), (b - a).std(ddof=1), len(a))
    assert paired_p(change) == pytest.approx(stats.ttest_rel(a, b).pvalue)


def test_holm_steps_down_and_leaves_out_what_was_not_tested() -> None:
    assert holm([0.01, None, 0.04, 0.03, 0.9]) == [0.04, None, 0.09, 0.09, 0.9]
    assert holm([]) == []


def test_comparing_plans_imports_nothing_heavy() -> None:
    sample = str(Path(__file__).with_name("test_plans_sample.json"))
    code = (
        f"import sys; from flowmm.cli import main; code = main(['diff', {sample!r}, {sample!r}]); "
        "print(code, {'torch', 'scipy', 'numpy', 'transformers', 'pyarrow', 'rich'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 set()"
