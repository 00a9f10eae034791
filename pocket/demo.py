"""What ``make demo`` runs: profile the pocket model, freeze a plan, ask about many images on a fifth of the cache.

Every step is a ``flowmm`` command that is shown before it runs, so that it can be typed again with other arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmm.pocket.tasks import Sample, samples

BUDGET = "20%"
COLUMNS = ("question", "expected", "full", "compressed", "entries", "KV bytes saved")


@dataclass(frozen=True)
class Answered:
    """A question, its only right answer, and what ``flowmm run --compare --json`` printed about it."""

    sample: Sample
    result: dict[str, Any]

    @property
    def full(self) -> str:
        return self.result["compare"]["full"]["text"].strip()

    @property
    def compressed(self) -> str:
        return self.result["text"].strip()

    def row(self) -> tuple[str, ...]:
        """Cells of the closing table, one per column of :data:`COLUMNS`."""
        kv = self.result["kv"]
        entries = f"{kv['full_tokens']} -> {kv['kept_tokens']:g}"
        saved = f"{kv['bytes_before'] - kv['bytes_after']:,} of {kv['bytes_before']:,}"
        return (self.sample.question, self.sample.answer, self.full, self.compressed, entries, saved)


def write_prompts(folder: Path, count: int) -> list[tuple[Sample, Path]]:
    """Write `count` questions of the test split, tasks in turn, each as a chat file with its PNG images.

    ``prompts.jsonl`` holds them all, in the form that ``flowmm profile --data`` reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, lines = [], []
    for number, sample in enumerate(samples("test", count), start=1):
        chat = {"messages": [_saved_message(message, folder, number) for message in sample.messages()]}
        lines.append(json.dumps(chat | {"answer": sample.answer}))
        path = folder / f"{number}.json"
        path.write_text(json.dumps(chat, indent=2) + "\n", encoding="utf-8")
        written.append((sample, path))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return written


def _saved_message(message: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """`message` with its images written to `folder` and named by files, relative to the chat file."""
    content = []
    for position, part in enumerate(message["content"]):
        if part["type"] == "image":
            name = f"{number}-{position}.png"
            part["image"].save(folder / name)
            part = {"type": "image", "image": name}
        content.append(part)
    return {**message, "content": content}


def flowmm(*arguments: object, save: Path | None = None) -> None:
    """Show a ``flowmm`` command, run it in a process of its own, and keep its stdout in `save` if given.

    Raises:
        SystemExit: the command failed; the exit code is its own.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ flowmm {shlex.join(words)}{f' > {save}' if save else ''}", flush=True)
    command = [sys.executable, "-m", "flowmm.cli", *words]
    if save is None:
        code = subprocess.run(command, check=False).returncode
    else:
        with save.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, check=False, stdout=file).returncode
    if code:
        raise SystemExit(code)


def answer(plan: Path, sample: Sample, chat: Path, folder: Path) -> Answered:
    """Ask one question on the full cache and on the compressed one."""
    saved = folder / f"answer-{chat.stem}.json"
    flowmm("run", "--plan", plan, "--messages", chat, "--budget", BUDGET, "--compare", "--json", save=saved)
    return Answered(sample, json.loads(saved.read_text(encoding="utf-8")))


def closing_table(answered: Sequence[Answered]) -> str:
    """A row per question, and how many each cache answered right."""
    rows = [COLUMNS, *(item.row() for item in answered)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    right = sum(item.full == item.sample.answer for item in answered)
    kept_right = sum(item.compressed == item.sample.answer for item in answered)
    score = f"right answers: {right} of {len(answered)} on the full cache, {kept_right} on {BUDGET} of it"
    return "\n".join([*lines, "", score])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo; every file it makes lies in ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m flowmm.pocket.demo", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for plan, prompts and answers")
    parser.add_argument("--questions", type=int, default=5, help="how many to ask")
    parser.add_argument("--calibration", type=int, default=32, help="how many prompts to profile")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    out, plan = options.out, options.out / "plan.json"
    # The embedded model needs no network, and is too small to gain from threads, which wait for each other on a busy
    # machine.
    for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    prompts = write_prompts(out / "prompts", options.questions)
    print(f"Wrote {len(prompts)} questions about {sum(len(s.images) for s, _ in prompts)} images to {out / 'prompts'}/")

    print("\n1. Profile: how much attention crosses modalities in each layer? The answer is frozen in a plan.")
    # Eight prompts measure layer budgets well enough for a look; the default is 32.
    profile = (
        "profile",
        "--model",
        "pocket",
        "--limit",
        options.calibration,
        "--sensitivity-prompts",
        8,
        "--out",
        plan,
    )
    flowmm(*profile, "--no-resume", "--overwrite", "--json", save=out / "profile.json")
    flowmm("inspect", plan)

    print(f"\n2. Ask: the same questions on the full KV cache and on {BUDGET} of it, merged as the plan says.")
    flowmm("run", "--plan", plan, "--messages", prompts[0][1], "--budget", BUDGET, "--compare")
    answered = [answer(plan, sample, chat, out) for sample, chat in prompts]

    print(f"\n3. What it saved.\n\n{closing_table(answered)}")
    print(f"\nDone in {time.monotonic() - start:.0f} s. Plan, prompts and answers: {out}/")


if __name__ == "__main__":
    main()
