"""Calibration prompts: where they come from and how a set of them is identified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowmm.errors import InputError
from flowmm.models import build_messages, open_image
from flowmm.models.messages import anchored, near

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
GENERATED = "pocket"
DEFAULT_FOLDER_PROMPT = "Describe the image."
# A generated picture has 32 pixels a side; other models than the pocket one see it at a photograph's size.
PHOTO_SIDE = 448


@dataclass(frozen=True)
class CalibrationSample:
    """One prompt as chat messages, with the name that error messages use."""

    name: str
    messages: Sequence[Mapping[str, Any]]

    def sha256(self) -> str:
        """Hash of roles, texts and image contents, in order; independent of file names and folders.

        Raises:
            InputError: an image cannot be read; the message names the sample.
        """
        digest = hashlib.sha256()
        for message in self.messages:
            content = message.get("content", "")
            digest.update(_framed(str(message.get("role", "")).encode()))
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                digest.update(_framed(self._part_bytes(part)))
        return digest.hexdigest()

    def _part_bytes(self, part: Mapping[str, Any]) -> bytes:
        if part.get("type") == "text":
            return b"text" + str(part.get("text", "")).encode()
        source = part.get("image", part.get("image_url", part.get("path")))
        source = source.get("url") if isinstance(source, Mapping) else source
        try:
            image = open_image(source)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error
        return b"image" + repr(image.size).encode() + image.tobytes()


def _framed(content: bytes) -> bytes:
    """Length-prefixed, so that two different sequences of parts never give the same bytes."""
    return len(content).to_bytes(8, "big") + content


def dataset_sha256(sample_hashes: Iterable[str]) -> str:
    """Hash of an ordered list of sample hashes."""
    return hashlib.sha256("\n".join(sample_hashes).encode()).hexdigest()


def load_calibration(
    data: str, *, limit: int | None = None, seed: int = 0, prompt: str | None = None, photo_size: bool = False
) -> list[CalibrationSample]:
    """Calibration prompts from a JSONL file, a folder of images, or the built-in generator (``"pocket"``).

    Args:
        data: path, or ``pocket``.
        limit: how many; from files, a seeded choice kept in file order; the generator makes 64 unless told.
        seed: of the choice, and of the generator.
        prompt: the question for a folder of images.
        photo_size: enlarge generated pictures (for models that expect photographs).

    Raises:
        InputError: no such data, nothing in it, or a line that is not a prompt (its number is named).
    """
    if data == GENERATED:
        return list(_generated(limit or 64, seed, photo_size))
    path = Path(data)
    if path.is_dir():
        samples = _image_folder(path, prompt or DEFAULT_FOLDER_PROMPT)
    elif path.is_file():
        samples = list(_json_lines(path))
    else:
        raise InputError(f"{data}: no such file or folder; expected JSONL, a folder of images, or {GENERATED!r}")
    if not samples:
        raise InputError(f"{data}: holds no calibration prompt")
    if limit is not None and limit < len(samples):
        chosen = np.random.default_rng(seed).permutation(len(samples))[:limit]
        samples = [samples[index] for index in sorted(chosen)]
    return samples


def _generated(count: int, seed: int, photo_size: bool) -> Iterator[CalibrationSample]:
    from flowmm.pocket.tasks import samples

    for sample in islice(samples("calibration", count, seed=seed), count):
        messages = sample.messages()
        if photo_size:
            messages = [_enlarged(message) for message in messages]
        yield CalibrationSample(f"{GENERATED}:{sample.task}:{sample.index}", messages)


def _enlarged(message: Mapping[str, Any]) -> dict[str, Any]:
    def enlarge(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part.get("type") != "image":
            return part
        return {**part, "image": part["image"].resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC)}

    return {**message, "content": [enlarge(part) for part in message["content"]]}


def _image_folder(folder: Path, prompt: str) -> list[CalibrationSample]:
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise InputError(f"{folder}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [CalibrationSample(path.name, build_messages(prompt, [path])) for path in images]


def _json_lines(path: Path) -> Iterator[CalibrationSample]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name = f"{path.name}:{number}"
            try:
                yield _sample_of(json.loads(line), name, path.parent)
            except (json.JSONDecodeError, InputError) as error:
                raise InputError(f"{name}: {error}") from error


def _sample_of(record: Any, name: str, folder: Path) -> CalibrationSample:
    """A line of JSONL: ``{"messages": [...]}`` or ``{"images": [...], "prompt": ...}``."""
    if not isinstance(record, dict):
        raise InputError(f"expected a JSON object, found {type(record).__name__}")
    if isinstance(record.get("messages"), list):
        messages = [anchored(message, folder) for message in record["messages"]]
        return CalibrationSample(name, messages)
    images, prompt = record.get("images", []), record.get("prompt")
    if not isinstance(prompt, str) or not isinstance(images, list) or not all(isinstance(i, str) for i in images):
        raise InputError('expected {"images": [paths], "prompt": text} or {"messages": [...]}')
    return CalibrationSample(name, build_messages(prompt, [near(image, folder) for image in images]))
