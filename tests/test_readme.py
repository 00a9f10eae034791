"""The README: its Python runs, its commands parse, its table of exit codes is the program's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from tiny_checkpoint import image_bytes, tiny_image, write_checkpoint

import flowmm
from flowmm import cli
from flowmm.models import load_model
from flowmm.plans import unprofiled_plan

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every ``flowmm ...`` line of the shell examples, with continued lines joined."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    found = [line.partition(" # ")[0].partition(" | ")[0].partition(" > ")[0].partition(" < ")[0] for line in lines]
    return [line.strip() for line in found if line.startswith("flowmm ")]


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (example,) = blocks("python")
    checkpoint = write_checkpoint(tmp_path / "tiny")
    unprofiled_plan(load_model(str(checkpoint)).fingerprint(), flowmm_version=flowmm.__version__).save(
        tmp_path / "tiny.json"
    )
    for name in re.findall(r'"([\w./-]+\.png)"', example):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image_bytes(tiny_image()))
    example, replaced = re.subn(r'load_model\("pocket"\)', 'load_model("./tiny")', example)
    example, plans = re.subn(r'"[\w./-]+\.json"', '"tiny.json"', example)
    assert (replaced, plans) == (1, 1)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert "entries per layer (" in capsys.readouterr().out


@pytest.mark.parametrize("line", commands())
def test_every_command_parses(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    if name == "--version":
        return
    command = cli.cli.commands[name]
    command.make_parser(click.Context(command)).parse_args(list(arguments))


def test_exit_codes_are_those_of_the_program() -> None:
    documented = re.findall(r"^\| (\d+) \| (.+?) \|$", README, flags=re.MULTILINE)
    program = re.findall(r"^  (\d+) +(.+)$", cli.EXIT_CODES, flags=re.MULTILINE)
    assert [code for code, _ in documented] == [code for code, _ in program]


def test_make_targets_and_links_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake (\w+)", "\n".join(blocks("sh"))):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / link).exists(), link
