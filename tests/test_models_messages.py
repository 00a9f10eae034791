"""Chat messages: building, interleaving, and what malformed ones are told."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_checkpoint import tiny_image

from flowmm.errors import InputError
from flowmm.models.messages import build_messages, open_conversation, split_conversations

RED, BLUE = tiny_image(), tiny_image(16, 16, "blue")


def kinds(messages: list[dict[str, Any]]) -> list[Any]:
    return [part.get("text", part.get("image")) for part in messages[-1]["content"]]


def test_images_come_before_the_text() -> None:
    assert kinds(build_messages("Which?", [RED, BLUE])) == [RED, BLUE, "Which?"]


def test_placeholders_interleave_in_order() -> None:
    assert kinds(build_messages("first <image>then <image>", [RED, BLUE])) == ["first ", RED, "then ", BLUE]


def test_system_turn_comes_first() -> None:
    messages = build_messages("Hi", system="Be brief.")
    assert [message["role"] for message in messages] == ["system", "user"]


@pytest.mark.parametrize("prompt", ["<image>", "<image><image><image>"])
def test_placeholder_count_must_match(prompt: str) -> None:
    with pytest.raises(InputError, match="placeholders but 2 images"):
        build_messages(prompt, [RED, BLUE])


def test_placeholder_without_images_is_refused() -> None:
    with pytest.raises(InputError, match="1 <image> placeholders but 0 images"):
        build_messages("see <image>")


def test_an_empty_prompt_is_refused_unless_there_is_an_image() -> None:
    with pytest.raises(InputError, match="prompt is empty"):
        build_messages("")
    assert kinds(build_messages("", [RED])) == [RED]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": RED},
        {"type": "image", "path": RED},
        {"type": "image_url", "image_url": {"url": RED}},
        {"type": "image_url", "image_url": RED},
    ],
)
def test_all_spellings_of_an_image_part(part: dict[str, Any]) -> None:
    messages, images = open_conversation([{"role": "user", "content": [part, {"type": "text", "text": "?"}]}])
    assert messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "?"}]
    assert images[0].size == RED.size


@pytest.mark.parametrize(
    "message",
    [
        "text",
        {"content": "no role"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": ["text"]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]},
    ],
)
def test_malformed_messages_say_where(message: Any) -> None:
    with pytest.raises(InputError, match=r"messages\[1\]"):
        open_conversation([{"role": "system", "content": "ok"}, message])


@pytest.mark.parametrize("messages", [[], "text", {"role": "user"}, [[]], [[{"role": "user"}], {"role": "user"}], None])
def test_neither_one_conversation_nor_several(messages: Any) -> None:
    with pytest.raises(InputError, match="messages: expected"):
        split_conversations(messages)
