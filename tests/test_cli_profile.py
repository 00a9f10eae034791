"""``flowmm profile`` as a user types it: where the plan goes, what is printed, what stops it before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import image_bytes, tiny_image, write_checkpoint

from flowmm import cli
from flowmm.plans import Plan


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-vl")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
        (folder / f"{name}.png").write_bytes(image_bytes(tiny_image(40, 32, colour)))
    return folder


@pytest.fixture
def profile(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, model: Path = checkpoint) -> int:
        return cli.main([str(word) for word in ["profile", "--model", model, *arguments]])

    return run


def test_the_plan_goes_to_plans_under_the_models_name(profile: Any, pictures: Path, capsys: Any) -> None:
    assert profile("--data", pictures, "--prompt", "what is this?") == 0
    plan = Plan.load("plans/tiny-vl.json")
    assert Path("plans/tiny-vl.records.parquet").is_file()
    assert plan.calibration is not None
    assert (plan.calibration.n_samples, plan.calibration.source) == (3, "pictures")
    output = capsys.readouterr()
    assert plan.short_id in output.out
    assert "mean ± std" in output.out
    assert "profiled 3 of 3 prompts" in output.err
    assert "layers were measured on 3 prompts, not 32" in output.err
    assert "wrote plans/tiny-vl.json from 3 prompts" in output.err


def test_json_is_one_object(profile: Any, pictures: Path, capsys: Any) -> None:
    assert profile("--data", pictures, "--out", "x/y.json", "--limit", 2, "--json", "--quiet") == 0
    output = capsys.readouterr()
    assert output.err == ""
    described, plan = json.loads(output.out), Plan.load("x/y.json")
    assert described["plan"] == "x/y.json"
    assert described["id"] == plan.short_id
    assert described["records"] == "x/y.records.parquet"
    assert described["samples"] == 2
    assert described["seconds"] > 0
    expected = [(layer.index, layer.rho and layer.rho.mean, layer.mode) for layer in plan.layers]
    assert [(layer["index"], layer["rho"], layer["mode"]) for layer in described["layers"]] == expected


def test_options_reach_the_plan(profile: Any, pictures: Path) -> None:
    options = ["--theta", "0.4", "--budget", "30%", "--preset", "paper", "--seed", "7", "--records", "r.parquet"]
    assert profile("--data", pictures, "--out", "p.json", *options) == 0
    plan = Plan.load("p.json")
    assert (plan.method.theta, plan.method.budget, plan.method.preset) == (0.4, 0.3, "paper")
    assert plan.calibration is not None
    assert plan.calibration.seed == 7
    assert Path("r.parquet").is_file()


def test_budgets_of_another_plan(profile: Any, pictures: Path, capsys: Any) -> None:
    data = ("--data", pictures, "--prompt", "what is this?", "-q")
    assert profile(*data, "--layer-budgets", "joint", "--decide", "theta", "--out", "old.json") == 0
    assert profile(*data, "--budgets-of", "old.json", "--decide", "theta", "--out", "new.json") == 0
    old, new = Plan.load("old.json"), Plan.load("new.json")
    assert old.allocations is not None
    assert new.allocations == old.allocations
    for total in (0.05, 0.2, 0.5):
        assert new.layer_budgets(total) == old.layer_budgets(total)
    assert old.short_id in new.note
    capsys.readouterr()
    assert profile(*data, "--budgets-of", "old.json", "--layer-budgets", "uniform", "--out", "no.json") == 2
    assert "give one of them" in capsys.readouterr().err
    assert profile(*data, "--budgets-of", "pocket", "--out", "no.json") == 3
    assert not Path("no.json").exists()


def test_an_existing_plan_is_kept_unless_told_otherwise(profile: Any, pictures: Path, capsys: Any) -> None:
    Path("plan.json").write_text("mine", encoding="utf-8")
    assert profile("--data", pictures, "--out", "plan.json") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Path("plan.json").read_text(encoding="utf-8") == "mine"
    assert profile("--data", pictures, "--out", "plan.json", "--overwrite") == 0
    assert Plan.load("plan.json").measured


def test_generated_prompts_are_the_default_and_said_so(profile: Any, capsys: Any) -> None:
    assert profile("--limit", 2) == 0
    assert "built-in generated prompts; prompts like your own (--data" in capsys.readouterr().err


def test_a_second_profile_measures_the_same(profile: Any, pictures: Path) -> None:
    assert profile("--data", pictures, "--out", "first.json") == 0
    assert profile("--data", pictures, "--out", "second.json", "--no-resume") == 0
    assert Plan.load("first.json").layers == Plan.load("second.json").layers


def test_json_lines(profile: Any, pictures: Path, capsys: Any) -> None:
    data = pictures / "prompts.jsonl"
    lines = [{"images": [f"{name}.png"], "prompt": "what?"} for name in "abc"]
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert profile("--data", data, "--out", "plan.json") == 0
    data.write_text('{"images": ["a.png"]}', encoding="utf-8")
    assert profile("--data", data, "--out", "other.json") == 2
    assert "prompts.jsonl:1: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--data", "absent.jsonl"], 2, "absent.jsonl: no such file or folder"),
        (["--budget", "512"], 2, "a plan holds a ratio"),
        (["--preset", "best"], 2, "expected one of"),
        (["--limit", "0"], 2, "--limit"),
        (["--dtype", "int8"], 2, "--dtype"),
    ],
)
def test_mistakes_leave_no_plan(profile: Any, arguments: list[str], code: int, said: str, capsys: Any) -> None:
    assert profile(*arguments) == code
    assert said in capsys.readouterr().err
    assert not Path("plans").exists()


def test_unknown_and_absent_models(profile: Any, capsys: Any) -> None:
    assert profile(model=Path("qwen25")) == 2
    assert "did you mean" in capsys.readouterr().err
    assert profile(model=Path("absent/dir/x")) == 4
    assert "no such directory" in capsys.readouterr().err


def test_a_corrupt_picture_is_named(profile: Any, pictures: Path, capsys: Any) -> None:
    (pictures / "b.png").write_bytes(b"not a picture")
    assert profile("--data", pictures, "--quiet") == 2
    assert "b.png: " in capsys.readouterr().err
    assert not Path("plans/tiny-vl.json").exists()
