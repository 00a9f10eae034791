"""``run``: answer a prompt about images on a compressed cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from flowmm.commands.notes import calm_libraries, print_note, warnings_as_notes
from flowmm.commands.options import PRESET_OPTION, BudgetType, loading_options
from flowmm.errors import InputError


@click.command()
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
@loading_options
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
    _refuse_combinations(click.get_current_context().params)
    from flowmm.plans import Plan, resolve_plan

    loaded_plan = None if plan is None else Plan.load(resolve_plan(plan))
    if loaded_plan is not None and check and not loaded_plan.measured:
        print_note(
            "warning: the plan holds no rho, so --check has nothing to compare with; make one with 'flowmm profile'"
        )
    conversation = _conversation(text, prompt, images, messages, system)

    from flowmm.runtime import generation

    calm_libraries()
    loaded = generation.load_planned_model(None if no_compress and model else loaded_plan, model, **loading)
    inputs = loaded.build_inputs(conversation)
    sampling = generation.Sampling(max_new_tokens, temperature, top_p, seed)
    compression = None
    if loaded_plan is not None and not no_compress:
        compression = generation.Compression(loaded_plan, budget, preset, check, compiled, cache == "static")
    streaming = sys.stdout.isatty() if stream is None else stream
    on_text = (lambda piece: click.echo(piece, nl=False)) if streaming and not (as_json or compare) else None
    comparison = None
    with warnings_as_notes():
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
        print_note(answer.summary())


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
