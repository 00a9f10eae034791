"""The ``flowmm`` command: each command parses, calls one function and prints.

Data goes to stdout, messages to stderr. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from flowmm import __version__
from flowmm.errors import DriftError, FlowmmError

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
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(render.rich_view(loaded))
    else:
        click.echo(render.plain(loaded), nl=False)


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


@cli.command()
@click.argument("old")
@click.argument("new")
@click.option(
    "--tol", type=float, default=0.02, show_default=True, help="Largest change of rho or budget that is no drift."
)
@click.option(
    "--fail-on",
    default="mode,rho,model,method",
    show_default=True,
    callback=_kinds,
    metavar="KINDS",
    help="Kinds of change that count as drift, from mode, rho, model, method, data; '' for none.",
)
@click.option(
    "--format", "form", type=click.Choice(["text", "json", "markdown", "github"]), default="text", show_default=True
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write there instead of to stdout.")
def diff(old: str, new: str, tol: float, fail_on: list[str], form: str, out: Path | None) -> None:
    """Say which layers moved from plan OLD to plan NEW. Exit code 1 on drift."""
    from flowmm.plans import diff_render
    from flowmm.plans.files import write_atomic

    difference, report = diff_render.diff_files(old, new, tol, fail_on, form)
    if out is None:
        click.echo(report, nl=False)
    else:
        write_atomic(out, report)
    if difference.drifted:
        raise DriftError(diff_render.summary(difference))


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
