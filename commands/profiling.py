"""``profile``: a model's prompts in, a plan file out."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowmm.commands.inspecting import show_plan
from flowmm.commands.notes import calm_libraries, print_note
from flowmm.commands.options import MAX_BAD_OPTION, PRESET_OPTION, QUIET_OPTION, BudgetType, loading_options
from flowmm.errors import InputError

if TYPE_CHECKING:
    from flowmm.profiler.profiling import Progress


@click.command()
@click.option("--model", required=True, help="Alias (see 'flowmm models'), checkpoint directory or hub id.")
@click.option(
    "--data",
    multiple=True,
    default=["pocket"],
    show_default=True,
    help="Calibration prompts: JSONL, JSON or parquet, a MileBench folder, a folder of images or of parquet files, - "
    "for JSONL on stdin, 'pocket' for generated ones. Repeatable.",
)
@click.option("--prompt", help="The question for a folder of images.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Plan file.  [default: plans/MODEL.json]")
@click.option(
    "--records",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Parquet file of what was measured per prompt.  [default: beside the plan]",
)
@click.option("--limit", type=click.IntRange(min=1), help="At most so many prompts (generated ones: 64 by default).")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--theta", type=click.FloatRange(0, 1), help="rho above theta: a cross-modal layer.  [default: 0.25]")
@click.option(
    "--decide",
    type=click.Choice(["theta", "lift", "measured"]),
    help="A layer is cross-modal if rho exceeds theta, or if it exceeds that of uniform attention. measured: by theta, "
    "but a layer takes another mode, selector, merge operator, min_sim or tau where that changes the next token less "
    "on prompts that did not propose it.  [default: measured with --layer-budgets joint, else theta]",
)
@click.option(
    "--rho-kind",
    type=click.Choice(["raw", "nosink", "nosink_auto", "balanced", "v2t", "t2v"]),
    help="The estimate of rho that is compared with theta.  [default: raw]",
)
@click.option("--budget", type=BudgetType(), help="Share of the prompt's entries kept, such as 0.2 or 20%.")
@PRESET_OPTION
@click.option(
    "--until-ci",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="WIDTH",
    help="Stop when half the 95 % interval of every layer's estimate is at most this, such as 0.02.",
)
@MAX_BAD_OPTION
@click.option(
    "--layer-budgets",
    type=click.Choice(["uniform", "pyramid", "entropy", "variance", "measured", "joint"]),
    help="measured: entries go to the layers whose compression changes the next token most; joint: the same with all "
    "layers compressed at once, which holds the prompts' states in memory; the others are rules of PyramidKV, MEDA and "
    "D2O, to compare with.  [default: measured; uniform for --data -]",
)
@click.option(
    "--budgets-of",
    metavar="PLAN",
    help="Take the layer budgets from this plan instead; with --decide measured, the default then, choices along them.",
)
@click.option(
    "--protocol",
    type=click.Choice(["mixed", "aware", "blind"]),
    default="mixed",
    show_default=True,
    help="Measure layers with the question inside the compressed prompt, asked after it, or both.",
)
@click.option(
    "--sensitivity-prompts",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Prompts, of those up to --limit, that measured layer budgets and decisions, and those by entropy or "
    "variance, are taken from.",
)
@click.option("--sample-rows", type=click.IntRange(min=2), help="Also record rho from so many rows per modality.")
@click.option("--dry-run", is_flag=True, help="Say what this would cost, from a few prompts, and write nothing.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Use what a stopped run has measured.")
@click.option("--overwrite", is_flag=True, help="Replace an existing plan file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@QUIET_OPTION
@loading_options
def profile(
    model: str,
    data: tuple[str, ...],
    prompt: str | None,
    out: Path | None,
    records: Path | None,
    limit: int | None,
    seed: int,
    theta: float | None,
    decide: str | None,
    rho_kind: str | None,
    budget: float | int | None,
    preset: str | None,
    until_ci: float | None,
    max_bad: float,
    layer_budgets: Any,
    budgets_of: str | None,
    protocol: Any,
    sensitivity_prompts: int,
    sample_rows: int | None,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    device: str,
    **loading: Any,
) -> None:
    """Measure how much attention crosses modalities in each layer of a model, and freeze it in a plan file.

    Several processes share the prompts: torchrun --nproc-per-node 2 --no-python flowmm profile ...
    """
    if budgets_of and layer_budgets:
        raise click.UsageError("--budgets-of and --layer-budgets both say how the budget is split; give one of them")
    layer_budgets = layer_budgets or ("uniform" if "-" in data else "measured")
    decide = decide or ("measured" if layer_budgets == "joint" or budgets_of else "theta")
    if "-" in data and (decide == "measured" or layer_budgets not in ("uniform", "pyramid")):
        option = "--decide measured" if decide == "measured" else f"--layer-budgets {layer_budgets}"
        raise click.UsageError(f"{option} reads the prompts twice, and stdin can be read once")
    if decide == "lift" and rho_kind is not None:
        raise click.UsageError("--decide lift compares with uniform attention; --rho-kind goes with the other two")
    start = time.monotonic()
    out = _plan_target(out, model, overwrite or dry_run)
    method = _method(preset, theta=theta, budget=budget, rho_kind="lift" if decide == "lift" else rho_kind)

    from flowmm.models import load_model, resolve_source
    from flowmm.models.fingerprint import public_source
    from flowmm.plans import Plan, resolve_plan
    from flowmm.profiler import open_calibration
    from flowmm.profiler import profile as measure
    from flowmm.profiler.calibration import calibration_name
    from flowmm.profiler.kernel_caches import bound_kernel_caches
    from flowmm.profiler.layer_questions import LayerQuestions
    from flowmm.profiler.progress import shown_progress
    from flowmm.profiler.ranks import is_first_rank, joined_ranks, rank_device, refuse_shared_stdin

    refuse_shared_stdin(data)
    rule = Plan.load(resolve_plan(budgets_of)) if budgets_of else layer_budgets
    questions = LayerQuestions(rule, decide == "measured", protocol, sensitivity_prompts)
    bound_kernel_caches()
    photographs = public_source(resolve_source(model)) != "pocket"
    samples = open_calibration(data, limit=limit, seed=seed, prompt=prompt, photo_size=photographs)
    first = is_first_rank()
    if first and "pocket" in data and photographs:
        print_note(
            "calibrating on built-in generated prompts; prompts like your own (--data FILE.jsonl) give a better plan"
        )
    calm_libraries()
    loaded = load_model(model, device=rank_device(device), **loading)
    if dry_run:
        _show_forecast(loaded, samples, questions.measurements, as_json)
        return
    records = records or out.with_suffix(".records.parquet")
    with joined_ranks() as ranks:
        with shown_progress(quiet or not first) as progress:
            plan = measure(
                loaded,
                samples,
                source=calibration_name(data),
                method=method,
                seed=seed,
                records=records,
                resume=resume,
                max_bad=max_bad,
                until_ci=until_ci,
                sampled_rows=sample_rows,
                progress=progress,
                on_skip=lambda sample: print_note(f"skipped {sample.name}: {sample.reason}"),
            )
        journal = questions.journal(records if first else None, plan, resume=resume)
        with _one_bar_at_a_time(quiet or not first) as progress:
            plan = questions.answer(loaded, plan, samples, progress=progress, journal=journal, ranks=ranks)
    if not first:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    plan.save(out)
    journal.discard()
    seconds = round(time.monotonic() - start, 3)
    count = plan.calibration.n_samples if plan.calibration else 0
    if not quiet and plan.sensitivity is not None and plan.sensitivity.n_samples < sensitivity_prompts:
        of = f"{plan.sensitivity.n_samples} prompts, not {sensitivity_prompts}"
        print_note(f"layers were measured on {of}: the data (up to --limit) has no more of use")
    if as_json:
        layers = [{"index": i.index, "rho": i.rho.mean if i.rho else None, "mode": i.mode} for i in plan.layers]
        described = {"plan": str(out), "id": plan.short_id, "records": str(records), "layers": layers}
        click.echo(json.dumps(described | {"samples": count, "seconds": seconds}, indent=2, ensure_ascii=False))
    else:
        show_plan(plan)
        print_note(f"wrote {out} from {count} prompts in {seconds:.1f} s")


@contextlib.contextmanager
def _one_bar_at_a_time(quiet: bool) -> Generator[Callable[[str, str], Progress | None]]:
    """A callback that begins the progress of one thing after another."""
    from flowmm.profiler.progress import shown_progress

    with contextlib.ExitStack() as shown:

        def begin(what: str, unit: str) -> Progress | None:
            shown.close()
            return shown.enter_context(shown_progress(quiet, what, unit))

        yield begin


def _show_forecast(loaded: Any, samples: Any, measurements: Any, as_json: bool) -> None:
    from flowmm.profiler.forecast import forecast

    expected = forecast(loaded, samples, measurements)
    click.echo(json.dumps(expected.to_dict(), indent=2, ensure_ascii=False) if as_json else str(expected))


def _plan_target(out: Path | None, model: str, overwrite: bool) -> Path:
    """The plan file to write.

    Raises:
        InputError: it exists and may not be replaced.
    """
    if out is None:
        # resolve() gives "." and "dir/" a name; a hub id keeps its last part.
        out = Path("plans") / f"{Path(model).resolve().name}.json"
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; pass --overwrite to replace it, or --out to write elsewhere")
    return out


def _method(preset: str | None, **changes: float | int | str | None) -> Any:
    """Method parameters of a plan.

    Raises:
        InputError: a budget in entries, which a plan cannot hold.
    """
    from flowmm.plans import MethodParameters

    budget = changes["budget"]
    if isinstance(budget, int):
        raise InputError(f"budget {budget}: a plan holds a ratio such as 0.2 or 20%; give entries to 'flowmm run'")
    return MethodParameters.from_preset(preset or "robust", **{k: v for k, v in changes.items() if v is not None})
