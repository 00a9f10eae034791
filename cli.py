"""The ``flowmm`` command: each command parses, calls one function and prints.

Data goes to stdout, messages to stderr. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from flowmm import __version__
from flowmm.errors import DriftError, FlowmmError, InputError

if TYPE_CHECKING:
    from flowmm.plans import Plan, PlanDiff
    from flowmm.plans.diff_statistics import Moments
    from flowmm.profiler.profiling import Progress

EXIT_CODES = """\b
Exit codes:
  0    fine, no drift
  1    drift, or a gate failed
  2    wrong usage, or an input that cannot be read
  3    incompatible: schema version, model or plan
  4    the run failed
  130  interrupted
  141  the reader of stdout closed it
"""
USAGE, FAILURE, INTERRUPTED, BROKEN_PIPE = 2, 4, 130, 141


@dataclass
class GlobalOptions:
    """What the group's own options say, for :func:`main`."""

    debug: bool = False


class Commands(click.Group):
    """Ends quietly when the reader of stdout is gone. click itself would exit with 1, which here means drift."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; 141 (128 + SIGPIPE, as the shell says) when its output is closed."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # What is still buffered would fail again when the interpreter flushes at exit.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="flowmm", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Profile how much attention crosses modalities, freeze it in a plan, generate on a merged KV cache."""
    context.ensure_object(GlobalOptions).debug = debug


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (table in ``flowmm --help``)."""
    options = GlobalOptions()
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a bar or an arrow gets a question mark, not a failed run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = cli.main(args=arguments, prog_name="flowmm", standalone_mode=False, obj=options)
        return code if isinstance(code, int) else 0
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return USAGE
    except FlowmmError as error:
        return _report(options, error, str(error), error.exit_code)
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {error}\nRun it again with 'flowmm --debug ...' to see where"
        return _report(options, error, message, FAILURE)


def _report(options: GlobalOptions, error: Exception, message: str, exit_code: int) -> int:
    if options.debug:
        traceback.print_exception(error)
    click.echo(f"flowmm: {message}", err=True)
    return exit_code


@cli.command()
@click.argument("plan")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(plan: str, as_json: bool) -> None:
    """Show PLAN, a file or a shipped name: model, calibration, method, and a row per layer."""
    import json

    from flowmm.plans import Plan, render, resolve_plan

    loaded = Plan.load(resolve_plan(plan))
    if as_json:
        click.echo(json.dumps(render.inspection(loaded), indent=2, ensure_ascii=False))
    else:
        _show_plan(loaded)


def _show_plan(plan: Plan) -> None:
    from flowmm.plans import render

    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(render.rich_view(plan))
    else:
        click.echo(render.plain(plan), nl=False)


@cli.command()
@click.argument("plans", metavar="PLAN...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, one object per plan.")
def validate(plans: tuple[str, ...], as_json: bool) -> int:
    """Check that each PLAN follows the format. The exit code is that of the worst."""
    import json

    from flowmm.plans.validate import validate_file

    checks = [validate_file(name) for name in plans]
    if as_json:
        click.echo(json.dumps([check.as_json() for check in checks], indent=2, ensure_ascii=False))
    else:
        for check in checks:
            click.echo(str(check))
    return max(check.exit_code for check in checks)


def _kinds(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    return [kind.strip() for kind in value.split(",") if kind.strip()]


Command = TypeVar("Command", bound=Callable[..., Any])


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
            callback=_kinds,
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


@cli.command()
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
    return paired_changes(*plans, *beside, note=_note)


class BudgetType(click.ParamType):
    """A ratio of the prompt (float) or a number of entries per layer (int), told apart by how it is written."""

    name = "budget"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | int:
        """``0.2``, ``1.0`` and ``20%`` are ratios, ``512`` is entries; a bare ``1`` could be either and is refused."""
        if isinstance(value, (int, float)):
            return value
        try:
            if value.endswith("%"):
                return self._ratio(float(value[:-1]) / 100)
            if "." in value:
                return self._ratio(float(value))
            entries = int(value)
        except ValueError:
            entries = 0
        if entries == 1:
            self.fail("1 is ambiguous: write 1.0 or 100% for the whole prompt, 2 or more for entries per layer")
        if entries < 1:
            self.fail(f"{value!r}: expected a ratio such as 0.2 or 20%, or a whole number of entries such as 512")
        return entries

    @staticmethod
    def _ratio(ratio: float) -> float:
        if not 0 < ratio <= 1:
            raise ValueError(ratio)
        return ratio


class ShareType(click.ParamType):
    """A share in [0, 1], written 0.01 or 1%."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share as a float."""
        if isinstance(value, float):
            return value
        try:
            share = float(value[:-1]) / 100 if value.endswith("%") else float(value)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            self.fail(f"{value!r}: expected a share such as 0.01 or 1%")
        return share


def _loading_options(command: Command) -> Command:
    """The options of :func:`flowmm.models.load_model` that ``profile``, ``run`` and ``check`` take."""
    dtypes = click.Choice(["auto", "bf16", "fp16", "fp32"])
    for option in (
        click.option("--revision", help="Branch, tag or commit of a hub repository."),
        click.option("--device-map", help="Spread the model, e.g. auto (needs accelerate)."),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps."),
        click.option("--dtype", type=dtypes, default="auto", show_default=True, help="auto: as stored."),
    ):
        command = option(command)
    return command


def _known_preset(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        from flowmm.plans import PRESETS

        if value not in PRESETS:
            raise click.BadParameter(f"{value!r}: expected one of {', '.join(PRESETS)}")
    return value


PRESET_OPTION = click.option(
    "--preset",
    "--method",
    callback=_known_preset,
    help="Method parameters: robust, paper, evict, ...  [default: robust, or the plan's]",
)


def _calm_libraries() -> None:
    """Progress bars of the libraries only where somebody watches."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def _note(message: str) -> None:
    click.echo(f"flowmm: {message}", err=True)


@contextlib.contextmanager
def _warnings_as_notes() -> Generator[None]:
    """What flowmm warns about, as one line on stderr; other libraries' warnings as they come."""
    from flowmm.runtime import FlowDriftWarning, NoCompilerWarning, PlanFitWarning

    ours = (FlowDriftWarning, NoCompilerWarning, PlanFitWarning)
    show = warnings.showwarning

    def show_note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, ours):
            _note(f"warning: {message}")
        else:
            show(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        for category in ours:
            warnings.simplefilter("always", category)
        warnings.showwarning = show_note  # ty: ignore[invalid-assignment]
        yield


@cli.command()
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
@click.option(
    "--max-bad", type=ShareType(), default="1%", show_default=True, help="Fail if more of the prompts cannot be read."
)
@click.option(
    "--layer-budgets",
    type=click.Choice(["uniform", "pyramid", "entropy", "variance", "measured", "joint"]),
    help="measured: entries go to the layers whose compression changes the next token most; joint: the same with all "
    "layers compressed at once, which holds the prompts' states in memory; the others are rules of PyramidKV, MEDA and "
    "D2O, to compare with.  [default: measured; uniform for --data -]",
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
    help="Prompts that measured layer budgets and decisions, and those by entropy or variance, are taken from.",
)
@click.option("--sample-rows", type=click.IntRange(min=2), help="Also record rho from so many rows per modality.")
@click.option("--dry-run", is_flag=True, help="Say what this would cost, from a few prompts, and write nothing.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Use what a stopped run has measured.")
@click.option("--overwrite", is_flag=True, help="Replace an existing plan file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@_loading_options
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
    import json
    import time

    layer_budgets = layer_budgets or ("uniform" if "-" in data else "measured")
    decide = decide or ("measured" if layer_budgets == "joint" else "theta")
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
    from flowmm.profiler import open_calibration
    from flowmm.profiler import profile as measure
    from flowmm.profiler.calibration import calibration_name
    from flowmm.profiler.kernel_caches import bound_kernel_caches
    from flowmm.profiler.layer_questions import LayerQuestions
    from flowmm.profiler.progress import shown_progress
    from flowmm.profiler.ranks import is_first_rank, joined_ranks, rank_device, refuse_shared_stdin

    refuse_shared_stdin(data)
    bound_kernel_caches()
    photographs = public_source(resolve_source(model)) != "pocket"
    samples = open_calibration(data, limit=limit, seed=seed, prompt=prompt, photo_size=photographs)
    first = is_first_rank()
    if first and "pocket" in data and photographs:
        _note("calibrating on built-in generated prompts; prompts like your own (--data FILE.jsonl) give a better plan")
    _calm_libraries()
    loaded = load_model(model, device=rank_device(device), **loading)
    questions = LayerQuestions(layer_budgets, decide == "measured", protocol, sensitivity_prompts)
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
                on_skip=lambda sample: _note(f"skipped {sample.name}: {sample.reason}"),
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
    if as_json:
        layers = [{"index": i.index, "rho": i.rho.mean if i.rho else None, "mode": i.mode} for i in plan.layers]
        described = {"plan": str(out), "id": plan.short_id, "records": str(records), "layers": layers}
        click.echo(json.dumps(described | {"samples": count, "seconds": seconds}, indent=2, ensure_ascii=False))
    else:
        _show_plan(plan)
        _note(f"wrote {out} from {count} prompts in {seconds:.1f} s")


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
    import json

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


@cli.command()
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
@click.option(
    "--max-bad", type=ShareType(), default="1%", show_default=True, help="Fail if more of the prompts cannot be read."
)
@_drift_options
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@_loading_options
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
    old_rho = prompt_rho(agreed, path, records, _note)
    bound_kernel_caches()
    _calm_libraries()
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
            on_skip=lambda sample: _note(f"skipped {sample.name}: {sample.reason}"),
        )
    _tell_drift(difference, form, out, path, text)


@cli.command()
@click.argument("text", metavar="[PROMPT]", required=False)
@click.option("--plan", help="Plan file, or a shipped name such as qwen25vl.")
@click.option("--model", help="Alias, checkpoint directory or hub id.  [default: the model the plan was made for]")
@click.option("--image", "images", multiple=True, help="Path, data URL, or - for stdin. Repeatable.")
@click.option("--prompt", help="Text, or @FILE; <image> marks where the images go.  [default: stdin]")
@click.option("--messages", type=click.Path(path_type=Path), help="A chat as JSON, instead of prompt and images.")
@click.option("--system", help="System message.")
@click.option("--budget", type=BudgetType(), help="0.2 or 20%: of the prompt; 512: entries per layer.")
@PRESET_OPTION
@click.option(
    "--check", type=click.Choice(["warn", "error", "adapt"]), help="Compare this prompt's rho with the plan's."
)
@click.option("--compare", is_flag=True, help="Answer on the full cache, too, and show both.")
@click.option("--no-compress", is_flag=True, help="Answer on the full cache only.")
@click.option(
    "--cache",
    type=click.Choice(["growing", "static"]),
    help="static: memory of fixed shape, in which decoding can be compiled, too; the same tokens.  [default: growing]",
)
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=None,
    help="Merge with compiled code, and decode with it from a static cache.  [default: on a GPU]",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from this share of probability.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--stream/--no-stream", default=None, help="Print words as they come.  [default: in a terminal]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_loading_options
def run(
    text: str | None,
    plan: str | None,
    model: str | None,
    images: tuple[str, ...],
    prompt: str | None,
    messages: Path | None,
    system: str | None,
    budget: float | int | None,
    preset: str | None,
    check: Any,
    compare: bool,
    no_compress: bool,
    cache: str | None,
    compiled: bool | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    seed: int,
    stream: bool | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Answer PROMPT about images on a KV cache compressed as PLAN says."""
    import json

    _refuse_combinations(click.get_current_context().params)
    from flowmm.plans import Plan, resolve_plan

    loaded_plan = None if plan is None else Plan.load(resolve_plan(plan))
    if loaded_plan is not None and check and not loaded_plan.measured:
        _note("warning: the plan holds no rho, so --check has nothing to compare with; make one with 'flowmm profile'")
    conversation = _conversation(text, prompt, images, messages, system)

    from flowmm.runtime import generation

    _calm_libraries()
    loaded = generation.load_planned_model(None if no_compress and model else loaded_plan, model, **loading)
    inputs = loaded.build_inputs(conversation)
    sampling = generation.Sampling(max_new_tokens, temperature, top_p, seed)
    compression = None
    if loaded_plan is not None and not no_compress:
        compression = generation.Compression(loaded_plan, budget, preset, check, compiled, cache == "static")
    streaming = sys.stdout.isatty() if stream is None else stream
    on_text = (lambda piece: click.echo(piece, nl=False)) if streaming and not (as_json or compare) else None
    comparison = None
    with _warnings_as_notes():
        if compare and compression is not None:
            comparison = generation.compare_caches(loaded, inputs, compression, sampling)
            answer = comparison.compressed
        else:
            answer = generation.generate_answer(loaded, inputs, compression, sampling, on_text)
    if as_json:
        described = answer.to_dict() | {
            "plan": None if loaded_plan is None else {"source": plan, "id": loaded_plan.short_id},
            "check": None if answer.findings is None else {"action": check, "findings": list(answer.findings)},
        }
        described |= {} if comparison is None else {"compare": comparison.to_dict()}
        click.echo(json.dumps(described, indent=2, ensure_ascii=False))
    else:
        # What was streamed needs only its line ended.
        click.echo(comparison or ("" if on_text else answer.text))
        _note(answer.summary())


def _refuse_combinations(options: Mapping[str, Any]) -> None:
    """Options of ``run`` that contradict each other, before anything is loaded."""
    whole, compare, as_json = (options[name] for name in ("no_compress", "compare", "as_json"))
    refused = {
        "--plan is missing (only --no-compress with --model goes without)": not (
            options["plan"] or (whole and options["model"])
        ),
        "--no-compress excludes --compare, --check, --cache, --budget and --preset": whole
        and (compare or any(options[name] for name in ("check", "cache", "budget", "preset"))),
        "--stream excludes --json and --compare, which print when all is done": options["stream"]
        and (as_json or compare),
        "--top-p needs a --temperature above 0": options["top_p"] is not None and options["temperature"] == 0,
    }
    for message, found in refused.items():
        if found:
            raise click.UsageError(message)


def _conversation(
    text: str | None, prompt: str | None, images: tuple[str, ...], messages: Path | None, system: str | None
) -> list[dict[str, Any]]:
    """Chat messages from what the user gave; their images are opened here, before a model is loaded.

    Raises:
        InputError: an image or a file cannot be read, or the messages are malformed.
    """
    if messages is not None and (text is not None or prompt is not None or images or system is not None):
        raise click.UsageError("--messages holds the whole chat; leave out prompt, --image and --system")
    if text is not None and prompt is not None:
        raise click.UsageError("the prompt is given twice, as an argument and as --prompt; give one")
    if images.count("-") > 1:
        raise click.UsageError("--image - reads all of stdin, so it can be given once")
    from flowmm.models.messages import build_messages, open_conversation, read_conversation

    if messages is not None:
        chat = read_conversation(messages)
    else:
        sources = [sys.stdin.buffer.read() if image == "-" else image for image in images]
        chat = build_messages(_prompt_text(prompt if text is None else text, "-" in images), sources, system)
    open_conversation(chat)
    return chat


def _prompt_text(given: str | None, stdin_is_image: bool) -> str:
    """The prompt as given, from ``@FILE`` (``@@`` for a text that starts with @), or from stdin."""
    if given is None:
        piped = "" if stdin_is_image or sys.stdin.isatty() else sys.stdin.read().strip()
        if not piped:
            raise click.UsageError("no prompt: give PROMPT, --prompt TEXT, --prompt @FILE, or text on stdin")
        return piped
    if given.startswith("@@"):
        return given[1:]
    if given.startswith("@"):
        try:
            return Path(given[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{given[1:]}: cannot be read as UTF-8 text ({error}); @ means a file, @@ an @") from error
    return given


def _ratios(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    budgets = [BudgetType().convert(text, parameter, context) for text in _kinds(context, parameter, value)]
    if not budgets or not all(isinstance(budget, float) for budget in budgets):
        raise click.BadParameter(f"{value!r}: expected ratios such as 0.02,0.1,20%")
    return sorted({float(budget) for budget in budgets})


@cli.command("eval")
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
@click.option("--budgets", callback=_ratios, default="0.2", show_default=True, help="Ratios, such as 0.02,0.1,20%.")
@click.option(
    "--protocols",
    default="",
    callback=_kinds,
    help="Of aware, blind, second.  [default: all; aware with --data]",
)
@click.option("--tasks", callback=_kinds, default="", help="Tasks of the suite.  [default: all]")
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
    type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
    default="fp32",
    show_default=True,
    help="fp32 measures the method alone, not rounding.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def evaluation(**options: Any) -> None:
    """Accuracy of compressed caches against the full one, with 95 % intervals and paired differences."""
    import json

    from flowmm.evaluation.command import run_evaluation

    _calm_libraries()
    wants_json = options.pop("as_json")
    results, described = run_evaluation(**options, note=_note)
    if wants_json:
        click.echo(json.dumps(results.as_json() | described, indent=2, ensure_ascii=False))
    else:
        click.echo(results.as_text(), nl=False)


def _lengths(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    numbers = _kinds(context, parameter, value)
    if not numbers or not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
        raise click.BadParameter(f"{value!r}: expected whole numbers such as 1024,4096")
    return [int(number) for number in numbers]


def _presets(context: click.Context, parameter: click.Parameter, value: str) -> list[str | None]:
    names = _kinds(context, parameter, value)
    return [_known_preset(context, parameter, name) for name in names] or [None]


@cli.command()
@click.option("--model", help="Alias, checkpoint directory or hub id.  [default: random weights of --shape]")
@click.option(
    "--shape", default="small", show_default=True, help="Of random weights: tiny, small, medium, qwen2.5-vl-7b."
)
@click.option("--plan", help="Plan file or shipped name.  [default: every layer cross-modal]")
@click.option("--tokens", default="1024,4096", show_default=True, callback=_lengths, help="Prompt lengths.")
@click.option("--batch", default="1", show_default=True, callback=_lengths, help="Rows per prompt.")
@click.option("--budgets", default="20%,100%", show_default=True, callback=_ratios, help="Shares of the prompt kept.")
@click.option("--methods", default="", callback=_presets, help="Presets, such as robust,evict.  [default: the plan's]")
@click.option(
    "--caches",
    default="dynamic,static,flowmm",
    show_default=True,
    callback=_kinds,
    help="Of dynamic, static (transformers' own), flowmm, flowmm-static.",
)
@click.option("--compile", "compiled", is_flag=True, help="Compile merging, and decoding from static caches.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Prefills per cache.")
@click.option("--new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), help="Begin no prompt that would not end within so many."
)
@click.option(
    "--memory", type=click.FloatRange(0, min_open=True), metavar="GIB", help="Leave out prompts whose caches need more."
)
@click.option("--note", default="", help="Kept with the results, such as what else ran on the machine.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON there, too, after every prompt."
)
@click.option("--resume", is_flag=True, help="Keep what OUT already holds, and measure the rest.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@_loading_options
def bench(
    model: str | None,
    shape: str,
    plan: str | None,
    tokens: list[int],
    batch: list[int],
    budgets: list[float],
    methods: list[str | None],
    caches: list[Any],
    compiled: bool,
    rounds: int,
    new_tokens: int,
    threads: int | None,
    minutes: float | None,
    memory: float | None,
    note: str,
    out: Path | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
    **loading: Any,
) -> None:
    """Measure prefill, time per token and memory against transformers' own caches, in turns."""
    import json

    from flowmm.plans import Plan, resolve_plan

    if resume and out is None:
        raise click.UsageError("--resume needs --out, the file to go on with")
    loaded_plan = None if plan is None else Plan.load(resolve_plan(plan))
    import torch

    from flowmm.runtime.bench import Settings
    from flowmm.runtime.bench_grid import Limits, cells, run_grid, table

    settings = Settings(tuple(caches), tuple(budgets), tuple(methods), rounds, new_tokens, compiled)
    _calm_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    result = run_grid(
        _bench_model(model, shape, loading),
        cells(tokens, batch),
        settings,
        plan=loaded_plan,
        limits=Limits(minutes, memory),
        out=out,
        resume=resume,
        note=note,
        progress=(lambda line: None) if quiet else _note,
    )
    click.echo(json.dumps(result, indent=1) if as_json else table(result))


def _bench_model(model: str | None, shape: str, loading: Mapping[str, Any]) -> Any:
    """A loaded model's transformers part, or random weights."""
    from flowmm.models import load_model
    from flowmm.models.random_weights import random_model

    if model is not None:
        return load_model(model, **loading).model
    return random_model(shape, device=loading["device"], dtype=loading["dtype"])


@cli.command()
@click.argument("name", type=click.Choice(["rho", "inverted", "budgets", "theta", "ablation"]))
@click.option("--model", default="pocket", show_default=True, help="Alias or checkpoint directory.")
@click.option("--plan", default="pocket", show_default=True, help="Plan file or shipped name, with a measured rho.")
@click.option("--n", type=click.IntRange(min=1), default=50, show_default=True, help="Cases per task.")
@click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)
@click.option("--runs", type=click.Path(file_okay=False, path_type=Path), default="runs/choices", show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="docs/figures", show_default=True)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def figure(name: str, out: Path, **options: Any) -> None:
    """Measure a figure of the paper again and write it as SVG, PNG and CSV into --out.

    What an earlier run left in --runs is not measured again.
    """
    from flowmm.evaluation.figures import write_figure
    from flowmm.evaluation.lab import open_lab

    _calm_libraries()
    for path in write_figure(name, open_lab(**options), out):
        click.echo(path)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, one object per model.")
def models(as_json: bool) -> None:
    """List the models flowmm knows by name, and what the KV cache of each costs."""
    import json

    from flowmm.models.listing import as_objects, as_table

    click.echo(json.dumps(as_objects(), indent=2) if as_json else as_table())


@cli.command()
def schema() -> None:
    """Print the JSON Schema of a plan."""
    from flowmm.plans.json_schema import SCHEMA_FILE

    click.echo(SCHEMA_FILE.read_text(encoding="utf-8"), nl=False)


if __name__ == "__main__":
    sys.exit(main())
