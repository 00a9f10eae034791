"""What counts as drift between two plans, and how it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowmm.errors import InputError
from flowmm.plans import Plan, PlanDiff, diff
from flowmm.plans.canonical import canonical_text
from flowmm.plans.diff import describe
from flowmm.plans.diff_render import github, markdown, summary, text, to_json

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
    at, above = diff(OLD, rho(4, 0.432)), diff(OLD, rho(4, 0.43201))
    assert len(at.changes) == 1
    assert not at.drifted
    assert above.drifted
    assert above.max_abs_rho == pytest.approx(0.02001)


def test_flipped_mode_is_drift_however_small_the_move() -> None:
    new = edited(lambda p: (p["layers"][2].update(mode="cross"), p["layers"][2]["rho"].update(mean=0.251)))
    difference = diff(OLD, new)
    assert [(change.kind, change.layer) for change in difference.drift] == [("mode", 2)]
    assert not diff(OLD, new, fail_on={"rho"}).drifted


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
    assert "  ! layer 4 rho 0.412 → 0.371 (Δ -0.041, tol 0.02)\n" in report
    assert "    layer 0 rho 0.18 → 0.19 (Δ +0.01, tol 0.02)\n" in report


def test_json_report() -> None:
    report = json.loads(to_json(diff(OLD, rho(4, 0.371))))
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
        }
    ]


def test_markdown_has_no_markup_from_a_plan() -> None:
    new = edited(lambda p: p["model"].update(source="a|b<img>`[x]"))
    table = [line for line in markdown(diff(OLD, new)).splitlines() if line.startswith("| yes")]
    assert table == ["| yes | model | model.source example/tiny-vl → a\\|b&lt;img>\\`\\[x\\] |"]


def test_github_points_at_the_line_of_the_layer() -> None:
    new = rho(4, 0.371)
    for content in (new.dumps(), "\n\n" + new.dumps().replace("\n", "\r\n")):
        line = next(number for number, row in enumerate(content.splitlines(), 1) if '"index": 4' in row)
        expected = f"::error file=plans/x.json,line={line},title=flowmm drift::layer 4 rho 0.412 → 0.371 "
        assert github(diff(OLD, new), "plans/x.json", content).startswith(expected)


def test_github_escapes() -> None:
    new = edited(lambda p: p["model"].update(source="50%::error"))
    command = github(diff(OLD, new), "a,b:c%.json", new.dumps())
    assert command.startswith("::error file=a%2Cb%3Ac%25.json,line=6,")
    assert "→ 50%25::error\n" in command


def test_github_gathers_what_would_not_be_shown() -> None:
    new = edited(
        lambda p: [layer["rho"].update(mean=1.0, q95=1.0) or layer.update(mode="cross") for layer in p["layers"]]
    )
    commands = github(diff(OLD, new), "x.json", new.dumps()).splitlines()
    assert len(commands) == 8
    assert "2 more:%0A" in commands[-1]


def test_github_without_drift_is_a_notice() -> None:
    assert github(diff(OLD, OLD), "x.json", OLD.dumps()).startswith("::notice file=x.json,line=1,")
