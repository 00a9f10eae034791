"""What compression costs in accuracy: ``eval``, and ``figure`` for the paper's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from flowmm.commands.notes import calm_libraries, print_note
from flowmm.commands.options import DTYPES, QUIET_OPTION, comma_list, ratios


@click.command("eval")
@click.option("--suite", type=click.Choice(["pocket"]), default="pocket", show_default=True, help="What is asked.")
@click.option("--data", help="Prompts without answers instead (JSONL, or a folder of images): fidelity only.")
@click.option("--model", default="pocket", show_default=True, help="Alias, checkpoint directory or hub id.")
@click.option("--plan", help="Plan file or shipped name.  [default: the shipped plan of the model, else unprofiled]")
@click.option(
    "--methods",
    default="full,robust,paper,evict",
    show_default=True,
    help="Presets, PRESET:field=value,..., merge=OPERATOR, or controls such as any_pivot; 'controls' and 'presets' "
    "stand for all of a kind. NAME@uniform: without the plan's budgets and choices.",
)
@click.option("--budgets", callback=ratios, default="0.2", show_default=True, help="Ratios, such as 0.02,0.1,20%.")
@click.option(
    "--protocols",
    default="",
    callback=comma_list,
    help="Of aware, blind, second.  [default: all; aware with --data]",
)
@click.option("--tasks", callback=comma_list, default="", help="Tasks of the suite.  [default: all]")
@click.option("--n", type=click.IntRange(min=1), default=100, show_default=True, help="Cases per task, or prompts.")
@click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--reference", help="One of the methods: compare it with each other one, case by case.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Keep rows, tables and curves there.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Use rows that an earlier run left in OUT.")
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, each with its own model."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps.")
@click.option(
    "--dtype",
    type=DTYPES,
    default="fp32",
    show_default=True,
    help="fp32 measures the method alone, not rounding.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@QUIET_OPTION
def evaluation(**options: Any) -> None:
    """Accuracy of compressed caches against the full one, with 95 % intervals and paired differences."""
    from flowmm.evaluation.command import run_evaluation

    calm_libraries()
    wants_json = options.pop("as_json")
    results, described = run_evaluation(**options, note=print_note)
    if wants_json:
        click.echo(json.dumps(results.as_json() | described, indent=2, ensure_ascii=False))
    else:
        click.echo(results.as_text(), nl=False)


@click.command()
@click.argument("name", type=click.Choice(["rho", "inverted", "budgets", "theta", "ablation"]))
@click.option("--model", default="pocket", show_default=True, help="Alias or checkpoint directory.")
@click.option("--plan", default="pocket", show_default=True, help="Plan file or shipped name, with a measured rho.")
@click.option("--n", type=click.IntRange(min=1), default=50, show_default=True, help="Cases per task.")
@click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)
@click.option("--runs", type=click.Path(file_okay=False, path_type=Path), default="runs/choices", show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="docs/figures", show_default=True)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
@QUIET_OPTION
def figure(name: str, out: Path, **options: Any) -> None:
    """Measure a figure of the paper again and write it as SVG, PNG and CSV into --out.

    What an earlier run left in --runs is not measured again.
    """
    from flowmm.evaluation.figures import write_figure
    from flowmm.evaluation.lab import open_lab

    calm_libraries()
    for path in write_figure(name, open_lab(**options), out):
        click.echo(path)
