"""``bench``: what compression saves in time and memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from flowmm.commands.notes import calm_libraries, print_note
from flowmm.commands.options import QUIET_OPTION, comma_list, known_preset, loading_options, ratios


def _lengths(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    numbers = comma_list(context, parameter, value)
    if not numbers or not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
        raise click.BadParameter(f"{value!r}: expected whole numbers such as 1024,4096")
    return [int(number) for number in numbers]


def _presets(context: click.Context, parameter: click.Parameter, value: str) -> list[str | None]:
    names = comma_list(context, parameter, value)
    return [known_preset(context, parameter, name) for name in names] or [None]


@click.command()
@click.option("--model", help="Alias, checkpoint directory or hub id.  [default: random weights of --shape]")
@click.option(
    "--shape", default="small", show_default=True, help="Of random weights: tiny, small, medium, qwen2.5-vl-7b."
)
@click.option("--plan", help="Plan file or shipped name.  [default: every layer cross-modal]")
@click.option("--tokens", default="1024,4096", show_default=True, callback=_lengths, help="Prompt lengths.")
@click.option("--batch", default="1", show_default=True, callback=_lengths, help="Rows per prompt.")
@click.option("--budgets", default="20%,100%", show_default=True, callback=ratios, help="Shares of the prompt kept.")
@click.option("--methods", default="", callback=_presets, help="Presets, such as robust,evict.  [default: the plan's]")
@click.option(
    "--caches",
    default="dynamic,static,flowmm",
    show_default=True,
    callback=comma_list,
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
@QUIET_OPTION
@loading_options
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
    from flowmm.plans import Plan, resolve_plan

    if resume and out is None:
        raise click.UsageError("--resume needs --out, the file to go on with")
    loaded_plan = None if plan is None else Plan.load(resolve_plan(plan))
    import torch

    from flowmm.runtime.bench import Settings
    from flowmm.runtime.bench_grid import Limits, cells, run_grid, table

    settings = Settings(tuple(caches), tuple(budgets), tuple(methods), rounds, new_tokens, compiled)
    calm_libraries()
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
        progress=(lambda line: None) if quiet else print_note,
    )
    click.echo(json.dumps(result, indent=1) if as_json else table(result))


def _bench_model(model: str | None, shape: str, loading: Mapping[str, Any]) -> Any:
    """A loaded model's transformers part, or random weights."""
    from flowmm.models import load_model
    from flowmm.models.random_weights import random_model

    if model is not None:
        return load_model(model, **loading).model
    return random_model(shape, device=loading["device"], dtype=loading["dtype"])
