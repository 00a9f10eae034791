"""What flowmm knows without a model at hand: ``inspect``, ``validate``, ``models`` and ``schema``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from flowmm.plans import Plan


@click.command()
@click.argument("plan")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(plan: str, as_json: bool) -> None:
    """Show PLAN, a file or a shipped name: model, calibration, method, and a row per layer."""
    from flowmm.plans import Plan, render, resolve_plan

    loaded = Plan.load(resolve_plan(plan))
    if as_json:
        click.echo(json.dumps(render.inspection(loaded), indent=2, ensure_ascii=False))
    else:
        show_plan(loaded)


def show_plan(plan: Plan) -> None:
    """The plan as a table on stdout; with colours in a terminal."""
    from flowmm.plans import render

    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(render.rich_view(plan))
    else:
        click.echo(render.plain(plan), nl=False)


@click.command()
@click.argument("plans", metavar="PLAN...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, one object per plan.")
def validate(plans: tuple[str, ...], as_json: bool) -> int:
    """Check that each PLAN follows the format. The exit code is that of the worst."""
    from flowmm.plans.validate import validate_file

    checks = [validate_file(name) for name in plans]
    if as_json:
        click.echo(json.dumps([check.as_json() for check in checks], indent=2, ensure_ascii=False))
    else:
        for check in checks:
            click.echo(str(check))
    return max(check.exit_code for check in checks)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, one object per model.")
def models(as_json: bool) -> None:
    """List the models flowmm knows by name, and what the KV cache of each costs."""
    from flowmm.models.listing import as_objects, as_table

    click.echo(json.dumps(as_objects(), indent=2) if as_json else as_table())


@click.command()
def schema() -> None:
    """Print the JSON Schema of a plan."""
    from flowmm.plans.json_schema import SCHEMA_FILE

    click.echo(SCHEMA_FILE.read_text(encoding="utf-8"), nl=False)
