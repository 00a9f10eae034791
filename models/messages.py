"""Chat messages: built from a prompt and images, checked, and split into what the template sees and the images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flowmm.errors import InputError
from flowmm.models.images import ImageSource, open_image

PLACEHOLDER = "<image>"

Message = Mapping[str, Any]
Conversation = Sequence[Message]


def build_messages(prompt: str, images: Sequence[ImageSource] = (), system: str | None = None) -> list[dict[str, Any]]:
    """One user turn in the chat format, after an optional system turn.

    Without ``<image>`` in `prompt` the images come first, then the text. With it, the n-th image takes the place of
    the n-th ``<image>``.

    Raises:
        InputError: the number of ``<image>`` placeholders differs from the number of images, or there is neither
            text nor image.
    """
    if not prompt and not images:
        raise InputError("the prompt is empty: expected text, images or both")
    texts = prompt.split(PLACEHOLDER)
    if len(texts) == 1:
        parts = [_image_part(image) for image in images] + [_text_part(prompt)]
    elif len(texts) - 1 == len(images):
        parts = [_text_part(texts[0])]
        for image, text in zip(images, texts[1:], strict=True):
            parts += [_image_part(image), _text_part(text)]
    else:
        raise InputError(
            f"the prompt has {len(texts) - 1} {PLACEHOLDER} placeholders but {len(images)} images are given; "
            f"give one image per placeholder, or leave the placeholders out"
        )
    messages = [{"role": "system", "content": system}] if system is not None else []
    return [*messages, {"role": "user", "content": [part for part in parts if part.get("text") != ""]}]


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image_part(image: ImageSource) -> dict[str, Any]:
    return {"type": "image", "image": image}


def read_conversation(path: str | Path) -> list[dict[str, Any]]:
    """Messages of a JSON file: a list of messages, or an object with the key ``messages``.

    Relative image paths are relative to the file. The images are not opened.

    Raises:
        InputError: the file cannot be read, is not JSON, or holds no messages.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a JSON file with messages") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON in UTF-8 ({error})") from error
    messages = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f"{path}: expected a non-empty list of {{'role', 'content'}} objects, or {{'messages': [...]}}"
        )
    return [anchored(message, path.parent) for message in messages]


def anchored(message: Any, folder: Path) -> Any:
    """`message` with the relative image paths of its parts taken from `folder`; a malformed one as it is."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_anchored_part(part, folder) for part in message["content"]]}


def _anchored_part(part: Any, folder: Path) -> Any:
    if not isinstance(part, dict):
        return part
    changed: dict[str, Any] = {
        key: near(part[key], folder) for key in ("image", "path") if isinstance(part.get(key), str)
    }
    url = part.get("image_url")
    if isinstance(url, dict) and isinstance(url.get("url"), str):
        changed["image_url"] = {**url, "url": near(url["url"], folder)}
    return {**part, **changed}


def near(image: str, folder: Path) -> str:
    """A relative path taken from `folder`; a URL as it is."""
    return image if image.startswith("data:") or "://" in image else str(folder / image)


def split_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """A list of conversations, whether one or several were given.

    Raises:
        InputError: neither a list of messages nor a list of such lists, or an empty one.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InputError("messages: expected a non-empty list of {'role', 'content'} objects, or a list of such lists")
    if all(isinstance(message, Mapping) for message in messages):
        return [messages]  # ty: ignore[invalid-explicit-return]
    if all(isinstance(row, Sequence) and not isinstance(row, str) and row for row in messages):
        return list(messages)  # ty: ignore[invalid-explicit-return]
    raise InputError("messages: expected either one conversation or only conversations, each with a message or more")


def open_conversation(conversation: Conversation) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Split a conversation into template messages (image parts without their pixels) and its opened images, in order.

    Raises:
        InputError: a malformed message, a part that is neither text nor image, or an image that cannot be opened.
    """
    template_messages: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    for position, message in enumerate(conversation):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise InputError(f"messages[{position}]: expected an object with 'role' (text) and 'content'")
        content = message["content"]
        if not isinstance(content, str):
            content = []
            for part, source in _read_parts(message["content"], f"messages[{position}].content"):
                content.append(part)
                if source is not None:
                    images.append(open_image(source))
        template_messages.append({"role": message["role"], "content": content})
    return template_messages, images


def _read_parts(parts: object, where: str) -> Iterator[tuple[dict[str, Any], ImageSource | None]]:
    """Yield each part as the template sees it, with the source of its image if it is one."""
    if not isinstance(parts, Sequence):
        raise InputError(f"{where}: expected text or a list of parts, found {type(parts).__name__}")
    for position, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield _text_part(part["text"]), None
        elif kind in ("image", "image_url") and (source := _image_source(part)) is not None:
            yield {"type": "image"}, source
        else:
            raise InputError(
                f"{where}[{position}]: expected {{'type': 'text', 'text': ...}}, {{'type': 'image', 'image': ...}} or "
                f"{{'type': 'image_url', 'image_url': {{'url': ...}}}}, found "
                + (f"type {kind!r} with keys {sorted(map(str, part))}" if kind else type(part).__name__)
            )


def _image_source(part: Mapping[str, Any]) -> ImageSource | None:
    if part["type"] == "image_url":
        url = part.get("image_url")
        return url.get("url") if isinstance(url, Mapping) else url
    return next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
