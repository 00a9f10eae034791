"""The files around ``flowmm check``: action, pre-commit hook, documentation."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest

from flowmm import cli
from flowmm.plans import shipped_names

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "drift.md").read_text(encoding="utf-8")


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def parse(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = cli.cli.commands[name]
    command.make_parser(click.Context(command)).parse_args(arguments)


def test_the_action_runs_a_command_that_parses_and_quotes_its_inputs(tmp_path: Path) -> None:
    action = read(".github/actions/flowmm-check/action.yml")
    check = next(step for step in action["runs"]["steps"] if step.get("id") == "check")
    assert "${{" not in check["run"]
    inputs = {name: value.partition("inputs.")[2].removesuffix(" }}") for name, value in check["env"].items()}
    assert set(inputs.values()) == set(action["inputs"])
    environment = {name: action["inputs"][value].get("default", "") for name, value in inputs.items()}
    environment |= {"PLAN": "a plan.json", "MODEL": "$(touch broken)"}
    script = 'flowmm() { printf "%q " flowmm "$@"; }\n' + check["run"]
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    path = {"PATH": "/usr/bin:/bin"}
    line = subprocess.run(command, env=environment | path, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shlex.split(line.stdout)[:4] == ["flowmm", "check", "--plan", "a plan.json"]
    assert not (tmp_path / "broken").exists()
    parse(line.stdout)


def test_the_actions_outputs_are_those_the_command_writes() -> None:
    outputs = read(".github/actions/flowmm-check/action.yml")["outputs"]
    values = {
        output["value"].removeprefix("${{ steps.check.outputs.").removesuffix(" }}") for output in outputs.values()
    }
    assert values == {"drift", "max_abs_rho"}


def test_the_hook_validates_plans_and_nothing_else() -> None:
    (hook,) = read(".pre-commit-hooks.yaml")
    assert hook["id"] == "flowmm-validate"

    def takes(path: str) -> bool:
        return bool(re.search(hook["files"], path)) and not re.search(hook["exclude"], path)

    assert all(takes(f"plans/{name}.json") for name in shipped_names())
    assert takes("models/plans/mine.json")
    assert not takes("plans/plan-1.schema.json")
    assert not takes("package.json")
    names = [f"plans/{name}.json" for name in shipped_names()]
    assert cli.main([*shlex.split(hook["entry"])[1:], *(str(ROOT / name) for name in names)]) == 0


@pytest.mark.parametrize("line", re.findall(r"^(?:\$ )?(flowmm (?:check|diff|profile) .*)$", GUIDE, flags=re.MULTILINE))
def test_commands_of_the_guide_parse(line: str) -> None:
    parse(line)


def test_links_and_yaml_of_the_guide() -> None:
    for link in re.findall(r"\]\(([\w./-]+)\)", GUIDE):
        assert (ROOT / "docs" / link).exists(), link
    (job,) = re.findall(r"^```yaml\n(.*?)^```$", GUIDE, flags=re.DOTALL | re.MULTILINE)
    (step,) = [s for s in yaml.safe_load(job)["jobs"]["drift"]["steps"] if "flowmm-check" in s.get("uses", "")]
    action = read(f"{step['uses'].removeprefix('./flowmm/')}/action.yml")
    assert set(step["with"]) <= set(action["inputs"])


def test_ci_checks_the_shipped_plan() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if "flowmm check" in line]
    parse(line)
