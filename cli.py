"""The ``flowmm`` command: brings together what is in ``commands/``, and turns errors into exit codes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import click

from flowmm import __version__
from flowmm.commands.answering import run
from flowmm.commands.benchmarking import bench
from flowmm.commands.drift import check, diff
from flowmm.commands.evaluating import evaluation, figure
from flowmm.commands.inspecting import inspect, models, schema, validate
from flowmm.commands.profiling import profile
from flowmm.errors import FlowmmError

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


for command in (inspect, validate, diff, profile, check, run, evaluation, bench, figure, models, schema):
    cli.add_command(command)


if __name__ == "__main__":
    sys.exit(main())
