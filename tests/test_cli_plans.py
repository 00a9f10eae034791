"""The plan commands as a user types them: output, streams, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from flowmm import __version__, cli
from flowmm.plans import Plan

SAMPLE = Path(__file__).with_name("test_plans_sample.json")
TEXT = SAMPLE.read_text(encoding="utf-8")


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    path = tmp_path / "moved.json"
    path.write_text(TEXT.replace('"mean": 0.412', '"mean": 0.371'), encoding="utf-8")
    return path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"flowmm {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from flowmm.cli import main; code = main(['--help']); "
        "print(code, {'torch', 'scipy', 'numpy', 'transformers', 'pyarrow', 'pydantic', 'rich'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 set()"


def test_inspect_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", SAMPLE) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "example/tiny-vl" in output.out
    row = next(line for line in output.out.splitlines() if line.startswith("4 "))
    assert row.split() == [
        "4",
        "█████│███▎···········",
        "0.412",
        "±",
        "0.032",
        "1.79",
        "5.1",
        "100%",
        "cross",
        "0.200",
    ]
    assert "\x1b" not in output.out


def test_inspect_in_a_terminal_shows_the_same_cells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    assert run("inspect", SAMPLE) == 0
    assert "█████│███▎···········" in capsys.readouterr().out


def test_inspect_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", SAMPLE, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["modes"] == {"cross": 3, "intra": 3, "online": 0}
    assert report["plan"] == json.loads(TEXT)
    assert report["sha256"] == Plan.load(SAMPLE).sha256


@pytest.mark.parametrize("name", ["qwen25vl", "plans/qwen25vl.json"])
def test_shipped_plan_from_any_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("inspect", name) == 0
    assert "nothing was measured" in capsys.readouterr().out


def test_validate_goes_on_after_a_bad_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newer, damaged = tmp_path / "newer.json", tmp_path / "damaged.json"
    newer.write_text(TEXT.replace("plan/1", "plan/2"), encoding="utf-8")
    damaged.write_text(TEXT[:300], encoding="utf-8")
    assert run("validate", SAMPLE) == 0
    assert run("validate", damaged, SAMPLE) == 2
    assert run("validate", newer, damaged, SAMPLE, "--json") == 3
    output = capsys.readouterr().out
    checks = json.loads(output[output.index("[\n") :])
    assert [check["valid"] for check in checks] == [False, False, True]
    assert [check["canonical"] for check in checks] == [None, None, True]


def test_diff_exit_codes(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diff", SAMPLE, SAMPLE) == 0
    assert run("diff", SAMPLE, moved) == 1
    assert run("diff", SAMPLE, moved, "--tol", "0.05") == 0
    assert run("diff", SAMPLE, moved, "--fail-on", "mode,data") == 0
    assert run("diff", SAMPLE, moved, "--fail-on", "") == 0
    assert run("diff", SAMPLE, moved, "--fail-on", "colour") == 2
    assert run("diff", SAMPLE, moved, "--format", "xml") == 2
    assert run("diff", SAMPLE, moved.with_name("none.json")) == 2
    capsys.readouterr()


def test_diff_data_to_stdout_and_verdict_to_stderr(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diff", SAMPLE, moved, "--format", "json") == 1
    output = capsys.readouterr()
    assert json.loads(output.out)["drifted"] is True
    assert output.err == "flowmm: drift: 1 of 1 change count as drift, 1 layer moved, largest rho change 0.041\n"


def test_diff_into_a_file(moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.md"
    assert run("diff", SAMPLE, moved, "--format", "markdown", "--out", out) == 1
    assert capsys.readouterr().out == ""
    assert out.read_text(encoding="utf-8").startswith("### flowmm diff")


def test_diff_github_names_the_file_from_here(
    moved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(moved.parent)
    assert run("diff", SAMPLE, moved, "--format", "github") == 1
    rows = Path("moved.json").read_text(encoding="utf-8").splitlines()
    line = next(number for number, row in enumerate(rows, start=1) if '"index": 4' in row)
    assert capsys.readouterr().out.startswith(f"::error file=moved.json,line={line},")


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("schema") == 0
    assert json.loads(capsys.readouterr().out)["properties"]["schema"]["const"] == "flowmm.plan/1"


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect") == 2
    assert run("conjure") == 2
    assert run("inspect", SAMPLE, "--colour") == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (RuntimeError("boom"), 4, "flowmm: unexpected RuntimeError: boom\nRun it again with 'flowmm --debug ...'"),
        (KeyboardInterrupt(), 130, ""),
        (click.FileError("x", "gone"), 2, "gone"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
    ],
)
def test_what_a_command_may_raise(
    error: BaseException,
    exit_code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Plan, "load", fail)
    assert run("inspect", SAMPLE) == exit_code
    written = capsys.readouterr().err
    assert message in written
    assert "Traceback" not in written


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--debug", "inspect", tmp_path / "none.json") == 2
    assert "Traceback" in capsys.readouterr().err


def test_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "flowmm.cli", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
