"""What moved: ``diff`` between two plans, ``check`` between a plan and its model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowmm.commands.notes import calm_libraries, print_note
from flowmm.commands.options import MAX_BAD_OPTION, QUIET_OPTION, Command, comma_list, loading_options
from flowmm.errors import DriftError

if TYPE_CHECKING:
    from flowmm.plans import Plan, PlanDiff
    from flowmm.plans.diff_statistics import Moments


def _drift_options(command: Command) -> Command:
    """What counts as drift and how it is told: the options that both ``diff`` and ``check`` take."""
    forms = click.Choice(["text", "json", "markdown", "github", "junit"])
    for option in (
        click.option(
            "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write there instead of to stdout."
        ),
        click.option("--format", "form", type=forms, default="text", show_default=True),
        click.option(
            "--fail-on",
            default="mode,rho,model,method",
            show_default=True,
            callback=comma_list,
            metavar="KINDS",
            help="Kinds of change that count as drift, from mode, rho, model, method, data; '' for none.",
        ),
        click.option(
            "--alpha",
            type=click.FloatRange(0, 1, min_open=True),
            default=0.01,
            show_default=True,
            help="Chance of a false alarm about rho, over all layers; 1: tolerance alone.",
        ),
        click.option(
            "--tol",
            type=float,
            default=0.02,
            show_default=True,
            help="Largest change of rho or budget that is no drift.",
        ),
    ):
        command = option(command)
    return command


def _tell_drift(difference: PlanDiff, form: str, out: Path | None, path: Path, plan_text: str) -> None:
    """Write the report.

    Raises:
        DriftError: something drifted.
    """
    from flowmm.plans import diff_render
    from flowmm.plans.files import write_atomic

    report = diff_render.render(difference, form, path, plan_text)
    if out is None:
        click.echo(report, nl=False)
    else:
        write_atomic(out, report)
    if form == "github":
        diff_render.append_github_files(difference, os.environ)
    if difference.drifted:
        raise DriftError(diff_render.summary(difference))


@click.command()
@click.argument("old")
@click.argument("new")
@click.option(
    "--records",
    nargs=2,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="OLD NEW",
    help="What was measured per prompt; the same prompts are then compared one by one.  [default: beside the plans]",
)
@_drift_options
def diff(
    old: str,
    new: str,
    records: tuple[Path, Path] | None,
    tol: float,
    alpha: float,
    fail_on: list[str],
    form: str,
    out: Path | None,
) -> None:
    """Say which layers moved from plan OLD to plan NEW. Exit code 1 on drift."""
    from flowmm.plans import Plan, resolve_plan
    from flowmm.plans import diff as compare
    from flowmm.plans.files import read_text

    old_path, new_path = resolve_plan(old), resolve_plan(new)
    new_text = read_text(new_path)
    plans = Plan.load(old_path), Plan.loads(new_text, new)
    paired = _paired_changes(plans, (old_path, new_path), records)
    _tell_drift(compare(*plans, tol, fail_on, alpha, paired), form, out, new_path, new_text)


def _paired_changes(
    plans: tuple[Plan, Plan], paths: tuple[Path, Path], records: tuple[Path, Path] | None
) -> Sequence[Moments] | None:
    """Changes of rho prompt by prompt, if the prompts are the same and their records are at hand."""
    beside = tuple(path.with_suffix(".records.parquet") for path in paths)
    prompts = [plan.calibration and plan.calibration.n_samples for plan in plans]
    if records is None and (prompts[0] != prompts[1] or not all(path.is_file() for path in beside)):
        return None
    from flowmm.profiler.prompt_rho import paired_changes

    if records is not None:
        return paired_changes(*plans, *records)
    return paired_changes(*plans, *beside, note=print_note)


@click.command()
@click.option("--plan", required=True, help="Plan file, or a shipped name such as pocket.")
@click.option("--model", help="Alias, checkpoint directory or hub id.  [default: the model the plan was made for]")
@click.option(
    "--data",
    multiple=True,
    help="Prompts, as of 'flowmm profile'. Repeatable.  [default: the plan's own, if they were generated ones]",
)
@click.option("--prompt", help="The question for a folder of images.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many prompts.  [default: as many as the plan's]")
@click.option("--seed", type=click.IntRange(min=0), help="Of the choice of prompts.  [default: the plan's]")
@click.option(
    "--records",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What the plan was made from; the same prompts are then compared one by one.  [default: beside the plan]",
)
@MAX_BAD_OPTION
@_drift_options
@QUIET_OPTION
@loading_options
def check(
    plan: str,
    model: str | None,
    data: tuple[str, ...],
    prompt: str | None,
    limit: int | None,
    seed: int | None,
    records: Path | None,
    max_bad: float,
    tol: float,
    alpha: float,
    fail_on: list[str],
    form: str,
    out: Path | None,
    quiet: bool,
    **loading: Any,
) -> None:
    """Profile again what a plan was made for, and say what moved. Exit code 1 on drift, 3 for another architecture."""
    from flowmm.plans import Plan, resolve_plan
    from flowmm.plans import diff as compare
    from flowmm.plans.files import read_text

    path = resolve_plan(plan)
    text = read_text(path)
    agreed = Plan.loads(text, plan)
    # A wrong --tol or --fail-on must not cost a profile first.
    compare(agreed, agreed, tol, fail_on, alpha)

    from flowmm.profiler import drift
    from flowmm.profiler.kernel_caches import bound_kernel_caches
    from flowmm.profiler.progress import shown_progress
    from flowmm.profiler.prompt_rho import prompt_rho
    from flowmm.runtime.generation import load_planned_model

    prompts, source, seed = drift.planned_prompts(
        agreed, data, limit=limit, seed=seed, prompt=prompt, photo_size=agreed.model.source != "pocket"
    )
    old_rho = prompt_rho(agreed, path, records, print_note)
    bound_kernel_caches()
    calm_libraries()
    if loading["dtype"] == "auto":
        loading["dtype"] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(agreed.model.dtype, "auto")
    loaded = load_planned_model(agreed, model, **loading)
    with shown_progress(quiet) as progress:
        difference = drift.check(
            loaded,
            agreed,
            prompts,
            source=source,
            seed=seed,
            rule=drift.Rule(tol, alpha, fail_on),
            old_rho=old_rho,
            max_bad=max_bad,
            progress=progress,
            on_skip=lambda sample: print_note(f"skipped {sample.name}: {sample.reason}"),
        )
    _tell_drift(difference, form, out, path, text)
