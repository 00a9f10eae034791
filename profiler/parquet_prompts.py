"""Prompts in parquet with the images inside, as data sets on the model hub store them; read by row group.

Images are a struct ``{bytes, path}``, plain bytes, or a list of either. The text is a column ``prompt``, ``question``
or ``text``, or ``messages``: JSON text or a list of ``{role, content}`` that shows the row's images in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flowmm.errors import InputError
from flowmm.models import build_messages
from flowmm.models.images import ImageSource
from flowmm.models.messages import PLACEHOLDER
from flowmm.profiler.samples import CalibrationSample, Sample, Source, UnreadableSample

TEXT_COLUMNS = ("prompt", "question", "text")
MESSAGES = "messages"
# Rows decoded at a time inside a row group: images are large.
ROWS_AT_A_TIME = 16


@dataclass(frozen=True)
class _Columns:
    """Which columns of a file hold the prompt."""

    text: str
    images: tuple[str, ...]

    @classmethod
    def of(cls, schema: pa.Schema, file: Path) -> _Columns:
        text = next((name for name in (MESSAGES, *TEXT_COLUMNS) if name in schema.names), None)
        if text is None:
            raise InputError(
                f"{file}: no column {', '.join((MESSAGES, *TEXT_COLUMNS))}; found {', '.join(schema.names)}; rename one"
            )
        return cls(text, tuple(field.name for field in schema if _holds_images(field.type)))


def parquet_source(files: Sequence[Path]) -> Source:
    """The rows of several files, in order.

    Raises:
        InputError: a file is not parquet, or has no text column.
    """
    count = 0
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                _Columns.of(parquet.schema_arrow, file)
                count += parquet.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: not a readable parquet file ({error}); copy or export it again") from error
    return Source(lambda: (sample for file in files for sample in _rows(file)), count)


def _rows(file: Path) -> Iterator[Sample]:
    with pq.ParquetFile(file) as parquet:
        columns = _Columns.of(parquet.schema_arrow, file)
        number = 0
        for group in range(parquet.num_row_groups):
            names = [columns.text, *columns.images]
            for batch in parquet.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=names, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield _sample(row, columns, f"{file.name}:{number}", file.parent)


def _sample(row: dict[str, Any], columns: _Columns, name: str, folder: Path) -> Sample:
    try:
        images = [image for column in columns.images for image in _images(row[column], folder)]
        text = row[columns.text]
        if columns.text == MESSAGES:
            return CalibrationSample(name, _fill_images(_parse_messages(text), images))
        if not isinstance(text, str):
            raise InputError(f"{columns.text}: expected text, found {type(text).__name__}")
        return CalibrationSample(name, build_messages(text, images))
    except InputError as error:
        return UnreadableSample(name, str(error))


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        return any(kind.field(place).name == "bytes" for place in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _images(value: Any, folder: Path) -> list[ImageSource]:
    if value is None:
        return []
    if isinstance(value, list):
        return [image for item in value for image in _images(item, folder)]
    if isinstance(value, bytes):
        return [value]
    if value["bytes"] is not None:
        return [value["bytes"]]
    if value.get("path"):
        return [folder / value["path"]]
    raise InputError("an image has neither bytes nor a path")


def _parse_messages(value: Any) -> list[Any]:
    try:
        messages = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise InputError(f"messages: not JSON ({error})") from error
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "content" in m for m in messages):
        raise InputError("messages: expected a list of {'role', 'content'} objects")
    return messages


def _fill_images(messages: list[Any], images: list[ImageSource]) -> list[Any]:
    """Image parts without a source, and ``<image>`` in texts, take the row's images in order; else they come first.

    Raises:
        InputError: more or fewer places than images.
    """
    messages = [{**message, "content": _split_text(message["content"])} for message in messages]
    places = sum(_is_empty_image(part) for message in messages for part in message["content"])
    if places == 0 and images:
        first = next((message for message in messages if message.get("role") == "user"), None)
        if first is None:
            raise InputError("messages: no user turn that could hold the row's images")
        first["content"] = [*repeat({"type": "image"}, len(images)), *first["content"]]
        places = len(images)
    if places != len(images):
        raise InputError(f"messages have {places} places for images, the row has {len(images)} images")
    remaining = iter(images)
    return [
        {
            **message,
            "content": [
                {**part, "image": next(remaining)} if _is_empty_image(part) else part for part in message["content"]
            ],
        }
        for message in messages
    ]


def _is_empty_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image" and not any(map(part.get, ("image", "path", "url")))


def _split_text(content: Any) -> list[Any]:
    """Content as a list of parts, with an image part for each ``<image>`` of a text."""
    if not isinstance(content, str):
        # A parquet struct has every key in every part; a text part's absent image is null.
        return [{k: v for k, v in p.items() if v is not None} if isinstance(p, dict) else p for p in content or []]
    parts: list[dict[str, Any]] = []
    for place, text in enumerate(content.split(PLACEHOLDER)):
        parts += [{"type": "image"}] if place else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts
