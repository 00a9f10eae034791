"""``flowmm eval`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoint import tiny_image, write_checkpoint

from flowmm.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny")))


def grid(checkpoint: str, *more: str) -> list[str]:
    return ["eval", "--model", checkpoint, "--split", "validation", "--n", "1", *more]


def test_default_grid_as_json(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(grid(checkpoint, "--tasks", "text_needle,find", "--json")) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    rows = result["rows"]
    assert {row["method"] for row in rows} == {"full", "robust", "paper", "evict"}
    assert {row["protocol"] for row in rows} == {"aware", "blind", "second"}
    assert {row["task"] for row in rows} == {"text_needle", "find", "average"}
    assert {(row["method"] == "full", row["budget"]) for row in rows} == {(True, 1.0), (False, 0.2)}
    assert result["plan"] == "unprofiled"
    assert "decides its mode per prompt" in output.err
    assert "measured 6/6" in output.err


def test_results_in_a_directory_are_used_again(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "first"
    command = grid(
        checkpoint, "--budgets", "0.1,20%", "--protocols", "second", "--out", str(out), "--reference", "evict"
    )
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first == "\n".join((out / f"{name}.txt").read_text(encoding="utf-8") for name in ("table", "leads"))
    files = {"rows.parquet", "summary.json", "curves.svg", "curves.png"}
    files |= {f"{name}.{kind}" for name in ("table", "leads") for kind in ("txt", "csv", "md")}
    assert {path.name for path in out.iterdir()} == files
    before = (out / "rows.parquet").stat().st_mtime_ns
    assert main([*command, "-q"]) == 0
    assert capsys.readouterr().out == first
    assert (out / "rows.parquet").stat().st_mtime_ns >= before
    leads = json.loads((out / "summary.json").read_text(encoding="utf-8"))["leads"]
    assert {(lead["reference"], lead["method"]) for lead in leads} == {
        ("evict", other) for other in ("full", "robust", "paper")
    }


def test_fidelity_on_prompts_without_answers(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_image().save(tmp_path / "red.png")
    prompts = [{"images": ["red.png"], "prompt": "what is shown here?"}, {"images": [], "prompt": "tell me a story"}]
    data = tmp_path / "own.jsonl"
    data.write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
    assert main(["eval", "--model", checkpoint, "--data", str(data), "--budgets", "0.2,1.0", "--json", "-q"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(row["suite"], row["task"], row["n"], row["accuracy"]) for row in rows} == {("own", "fidelity", 2, None)}
    whole = [row for row in rows if row["budget"] == 1.0]
    assert len(whole) == 4
    assert all(row["kl"] < 1e-6 and row["agreement"] == 1.0 for row in whole)
    assert all(max(row["attention_error"]) < 1e-6 for row in whole)
    assert all(row["kl"] > 1e-3 for row in rows if row["budget"] == 0.2)
    assert all(min(row["attention_error"]) > 1e-3 for row in rows if row["budget"] == 0.2)
    assert main(["eval", "--model", checkpoint, "--data", str(data), "--protocols", "blind", "-q"]) == 2
    assert "in front of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--methods", "best"], "best"),
        (["--protocols", "deaf"], "deaf"),
        (["--budgets", "64"], "ratios"),
        (["--budgets", "often"], "often"),
        (["--tasks", "chess"], "chess"),
        (["--reference", "mass"], "mass"),
        (["--plan", "nowhere.json"], "nowhere.json"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes_end_with_code_2(
    checkpoint: str, capsys: pytest.CaptureFixture[str], options: list[str], found: str
) -> None:
    assert main(grid(checkpoint, *options)) == 2
    assert found in capsys.readouterr().err


def test_a_plan_of_another_model_ends_with_code_3(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(grid(checkpoint, "--plan", "qwen25vl")) == 3
    assert "num_layers" in capsys.readouterr().err
