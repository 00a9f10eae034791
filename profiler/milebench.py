"""MileBench folders (arXiv 2404.18532): ``<root>/<Dataset>/<Dataset>.json`` with its images beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmm.errors import InputError
from flowmm.models import build_messages
from flowmm.models.messages import PLACEHOLDER
from flowmm.profiler.samples import UnreadableSample

# The one data set whose choices carry no letters.
WITHOUT_LETTERS = "GPR1200"
_MARKER = re.compile(r"\{(?:image|table)#(\d+)\}")


@dataclass(frozen=True)
class MileBenchSample:
    """One sample as its file holds it; `instruction` is already the one its id names."""

    dataset: str
    sample_id: str
    instruction: str
    context: str
    images: list[Path]
    choices: list[str]

    def messages(self) -> list[dict[str, Any]]:
        """One user turn: task instruction, context with the images at their markers, choices; nothing is cut.

        An image that no marker names comes first; a marker without an image goes.

        Raises:
            InputError: neither text nor image.
        """
        text = f"{self.instruction}\n{self.context}{self._choice_list()}".replace(PLACEHOLDER, "")
        named = [int(number) - 1 for number in _MARKER.findall(text)]
        placed = [number for number in named if 0 <= number < len(self.images)]
        unnamed = [number for number in range(len(self.images)) if number not in named]
        body = _MARKER.sub(
            lambda marker: PLACEHOLDER if 0 < int(marker.group(1)) <= len(self.images) else "",
            text,
        )
        return build_messages(PLACEHOLDER * len(unnamed) + body, [self.images[number] for number in unnamed + placed])

    def _choice_list(self) -> str:
        if not self.choices:
            return ""
        lettered = self.dataset != WITHOUT_LETTERS
        lines = [f"{chr(65 + place)}. {choice}" if lettered else choice for place, choice in enumerate(self.choices)]
        return "\nChoice list: \n" + "\n".join(lines) + "\nYour answer is: "


def dataset_files(folder: Path) -> list[Path]:
    """Data sets in `folder`, or `folder` itself if it is one, by name; empty if this is no MileBench folder."""
    own = folder / f"{folder.resolve().name}.json"
    if own.is_file():
        return [own]
    return sorted(file for child in folder.iterdir() if (file := child / f"{child.name}.json").is_file())


def read_dataset(file: Path) -> list[MileBenchSample | UnreadableSample]:
    """The samples of a data set's file, in order; a malformed one says in its place what is wrong with it.

    Raises:
        InputError: the file cannot be read or is no MileBench file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        instructions, records = content["meta_data"]["task_instruction"], content["data"]
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: not a MileBench file ({type(error).__name__}: {error}); expected meta_data.task_instruction and "
            "data"
        ) from error
    if not isinstance(records, list):
        raise InputError(f"{file}: not a MileBench file; expected a list as data, found {type(records).__name__}")
    return [_sample(file, number, record, instructions) for number, record in enumerate(records, start=1)]


def _sample(file: Path, place: int, record: Any, instructions: Any) -> MileBenchSample | UnreadableSample:
    try:
        number, instance = int(record["task_instruction_id"]), record["task_instance"]
        return MileBenchSample(
            dataset=file.stem,
            sample_id=str(record["sample_id"]),
            instruction=str(instructions[str(number)] if isinstance(instructions, Mapping) else instructions[number]),
            context=str(instance["context"]),
            images=[file.parent / "images" / path for path in instance["images_path"]],
            choices=[str(choice) for choice in instance.get("choice_list", [])],
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        name = record.get("sample_id") if isinstance(record, Mapping) else None
        return UnreadableSample(
            f"{file.stem}:{f'number {place}' if name is None else name}",
            f"not a MileBench sample ({type(error).__name__}: {error}); expected sample_id, task_instruction_id, and "
            "task_instance with context and images_path",
        )


def iterate(files: list[Path]) -> Iterator[MileBenchSample | UnreadableSample]:
    """The samples of several data sets, one file in memory at a time."""
    for file in files:
        yield from read_dataset(file)
