"""One calibration prompt: its messages, the hash of what they hold, and streams of such prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from PIL import Image

from flowmm.errors import InputError
from flowmm.models.messages import open_conversation


@dataclass(frozen=True)
class UnreadableSample:
    """A place in the data that holds no usable prompt, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class CalibrationSample:
    """One prompt as chat messages, with the name that error messages use.

    `further` texts may stand in the place of the last one: other questions about the same context.
    """

    name: str
    messages: Sequence[Mapping[str, Any]]
    further: tuple[str, ...] = ()

    def opened(self) -> CalibrationSample:
        """The same prompt with every image loaded, so that hashing and building inputs read each file once.

        Raises:
            InputError: malformed messages, or an image that cannot be read; the message names the sample.
        """
        try:
            template, images = open_conversation(self.messages)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error
        return replace(self, messages=_with_images(template, iter(images)))

    def sha256(self) -> str:
        """Hash of roles, texts and image contents, in order, and further questions; independent of file names.

        Raises:
            InputError: as :meth:`opened`.
        """
        digest = hashlib.sha256()
        for message in self.opened().messages:
            content = message["content"]
            digest.update(_framed(message["role"].encode()))
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                digest.update(_framed(_part_bytes(part)))
        for text in self.further:
            digest.update(_framed(b"further" + text.encode()))
        return digest.hexdigest()


Sample = CalibrationSample | UnreadableSample


def readable_samples(samples: Iterable[Sample], limit: int | None = None) -> Iterator[CalibrationSample]:
    """The prompts among `samples`, at most `limit`; unreadable places are passed over."""
    return islice((sample for sample in samples if isinstance(sample, CalibrationSample)), limit)


@dataclass(frozen=True)
class Source:
    """A stream of samples that can be read again (except stdin), and how many it has (None: unknown)."""

    read: Callable[[], Iterator[Sample]]
    count: int | None


def _with_images(template: Sequence[Mapping[str, Any]], images: Iterator[Image.Image]) -> list[dict[str, Any]]:
    def filled(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**part, "image": next(images)} if part["type"] == "image" else part

    return [
        {**message, "content": content if isinstance(content, str) else [filled(part) for part in content]}
        for message in template
        for content in [message["content"]]
    ]


def _part_bytes(part: Mapping[str, Any]) -> bytes:
    if part["type"] == "text":
        return b"text" + part["text"].encode()
    return b"image" + repr(part["image"].size).encode() + part["image"].tobytes()


def _framed(content: bytes) -> bytes:
    """Length-prefixed, so that two different sequences of parts never give the same bytes."""
    return len(content).to_bytes(8, "big") + content


def dataset_sha256(sample_hashes: Iterable[str]) -> str:
    """Hash of an ordered list of sample hashes, one after the other."""
    digest = hashlib.sha256()
    for place, sample in enumerate(sample_hashes):
        digest.update((sample if place == 0 else f"\n{sample}").encode())
    return digest.hexdigest()
