"""Where calibration prompts come from: one reader per format, each a stream that holds a part of the data at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from flowmm.errors import InputError
from flowmm.models import build_messages
from flowmm.models.messages import anchored, near
from flowmm.profiler import milebench
from flowmm.profiler.samples import CalibrationSample, Sample, Source, UnreadableSample

GENERATED = "pocket"
STDIN = "-"
GENERATED_COUNT = 64
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
DEFAULT_FOLDER_PROMPT = "Describe the image."
# A generated picture has 32 pixels a side; other models than the pocket one see it at a photograph's size.
PHOTO_SIDE = 448

Prompt = tuple[list[Any], tuple[str, ...]]
"""Messages and further questions."""


def open_source(data: str, *, limit: int | None, seed: int, prompt: str | None, photo_size: bool) -> Source:
    """The source `data` names; formats as in :func:`flowmm.profiler.calibration.open_calibration`.

    Raises:
        InputError: no such data, no known format, or a file that cannot be read at all.
    """
    if data == GENERATED:
        return Source(partial(_generated, limit or GENERATED_COUNT, seed, photo_size), limit or GENERATED_COUNT)
    if data == STDIN:
        return Source(lambda: _json_lines(sys.stdin, "stdin", Path()), None)
    path = Path(data)
    if path.is_dir():
        return _folder(path, prompt or DEFAULT_FOLDER_PROMPT)
    if not path.is_file():
        raise InputError(
            f"{data}: no such file or folder; expected JSONL, JSON, parquet, a MileBench folder, a folder of images or "
            f"parquet files, {STDIN!r} for JSONL on stdin, or {GENERATED!r}"
        )
    if path.suffix == ".parquet":
        from flowmm.profiler.parquet_prompts import parquet_source

        return parquet_source([path])
    if path.suffix == ".json":
        return _json_document(path)
    return _json_lines_file(path)


def _folder(path: Path, prompt: str) -> Source:
    if files := milebench.dataset_files(path):
        return _milebench(files)
    if shards := sorted(path.glob("*.parquet")):
        from flowmm.profiler.parquet_prompts import parquet_source

        return parquet_source(shards)
    images = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise InputError(
            f"{path}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}), no parquet file, and no MileBench data set "
            "(NAME/NAME.json)"
        )
    return Source(lambda: (CalibrationSample(i.name, build_messages(prompt, [i])) for i in images), len(images))


def _milebench(files: list[Path]) -> Source:
    def read() -> Iterator[Sample]:
        for sample in milebench.iterate(files):
            if isinstance(sample, UnreadableSample):
                yield sample
            else:
                name = f"{sample.dataset}:{sample.sample_id}"
                yield _sample_or_reason(name, lambda read=sample.messages: (read(), ()))

    return Source(read, sum(len(milebench.read_dataset(file)) for file in files))


def _generated(count: int, seed: int, photo_size: bool) -> Iterator[Sample]:
    from flowmm.pocket.tasks import samples

    for sample in islice(samples("calibration", count, seed=seed), count):
        messages = sample.messages()
        if photo_size:
            messages = [_enlarged(message) for message in messages]
        further = tuple("\n" + question for question in sample.further)
        yield CalibrationSample(f"{GENERATED}:{sample.task}:{sample.index}", messages, further)


def _enlarged(message: Mapping[str, Any]) -> dict[str, Any]:
    def enlarge(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part.get("type") != "image":
            return part
        return {**part, "image": part["image"].resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC)}

    return {**message, "content": [enlarge(part) for part in message["content"]]}


def _json_document(path: Path) -> Source:
    """A ``.json`` file: one conversation, a list of prompts, one prompt, or a MileBench data set."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON in UTF-8 ({error}); a file of JSON lines is named .jsonl") from error
    if isinstance(content, dict) and "meta_data" in content:
        return _milebench([path])
    if isinstance(content, list) and content and all(isinstance(item, dict) and "role" in item for item in content):
        content = {"messages": content}
    records = content if isinstance(content, list) else [content]

    def read() -> Iterator[Sample]:
        for number, record in enumerate(records, start=1):
            yield _sample_or_reason(f"{path.name}:{number}", partial(_prompt_of, record, path.parent))

    return Source(read, len(records))


def _json_lines_file(path: Path) -> Source:
    def read() -> Iterator[Sample]:
        with path.open(encoding="utf-8") as lines:
            yield from _json_lines(lines, path.name, path.parent)

    try:
        with path.open(encoding="utf-8") as lines:
            return Source(read, sum(1 for line in lines if line.strip()))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _json_lines(lines: Iterable[str], name: str, folder: Path) -> Iterator[Sample]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _sample_or_reason(f"{name}:{number}", partial(_prompt_of_line, line, folder))


def _prompt_of_line(line: str, folder: Path) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(str(error)) from error
    return _prompt_of(record, folder)


def _prompt_of(record: Any, folder: Path) -> Prompt:
    """Messages, and other questions about the same context, ``{..., "questions": [texts]}``."""
    messages, further = _messages_of(record, folder), record.get("questions", [])
    if not isinstance(further, list) or not all(isinstance(text, str) for text in further):
        raise InputError('expected "questions" to be a list of texts')
    return messages, tuple(further)


def _messages_of(record: Any, folder: Path) -> list[Any]:
    """Messages of ``{"messages": [...]}`` or ``{"images": [...], "prompt": ...}``."""
    if not isinstance(record, dict):
        raise InputError(f"expected a JSON object, found {type(record).__name__}")
    if isinstance(record.get("messages"), list):
        return [anchored(message, folder) for message in record["messages"]]
    images, prompt = record.get("images", []), record.get("prompt")
    if not isinstance(prompt, str) or not isinstance(images, list) or not all(isinstance(i, str) for i in images):
        raise InputError('expected {"images": [paths], "prompt": text} or {"messages": [...]}')
    return build_messages(prompt, [near(image, folder) for image in images])


def _sample_or_reason(name: str, read: Callable[[], Prompt]) -> Sample:
    try:
        return CalibrationSample(name, *read())
    except InputError as error:
        return UnreadableSample(name, str(error))
