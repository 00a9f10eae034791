"""The tokenizer: one token per word of the generator, any text accepted, training rows equal the chat template's."""

import unicodedata
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2Tokenizer

from flowmm.pocket import tasks
from flowmm.pocket.architecture import build_image_processor
from flowmm.pocket.batches import TOKENS_PER_IMAGE, Packer, patches
from flowmm.pocket.tokenizer import SPECIAL_TOKENS, build_tokenizer, words

# hypothesis runs a test many times over one fixture; a cached function says that this is meant.
built_once = cache(build_tokenizer)


@pytest.fixture
def tokenizer() -> Qwen2Tokenizer:
    return built_once()


def _rendered(tokenizer: Qwen2Tokenizer, messages: list[dict]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _expanded(tokenizer: Qwen2Tokenizer, text: str) -> list[int]:
    (image,) = tokenizer.encode("<|image_pad|>")
    return [copy for token in tokenizer.encode(text) for copy in [token] * (TOKENS_PER_IMAGE if token == image else 1)]


def test_words_and_special_tokens_are_one_token_each(tokenizer: Qwen2Tokenizer) -> None:
    for text in (*words(), *(" " + word for word in words()), *SPECIAL_TOKENS):
        assert len(tokenizer.encode(text)) == 1, text


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_a_round_trip(text: str) -> None:
    tokenizer = built_once()
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_training_rows_are_what_the_chat_template_gives(task: str, tokenizer: Qwen2Tokenizer) -> None:
    packer = Packer(tokenizer)
    for i in range(5):
        scene, (question, answer) = tasks.asked_scene(task, "train", i, images=3)
        ids = packer.context(scene)[0] + list(packer.turn(question, answer, "\n")[0])
        first = tasks.Sample(task, "train", i, scene.content(), question, answer).messages()
        assert ids == _expanded(tokenizer, _rendered(tokenizer, first) + answer + "<|im_end|>")
        ids += packer.turn(question, answer, "\n<|im_start|>user\n")[0]
        second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        assert ids == _expanded(tokenizer, _rendered(tokenizer, second) + answer + "<|im_end|>")


def test_training_pixels_are_what_the_image_processor_gives() -> None:
    pictures = tasks.draw_scene(tasks.stream("train", "any", 0), "train", images=3).pictures
    pixels = np.stack([picture.pixels for picture in pictures])
    processed = build_image_processor()(images=[Image.fromarray(each) for each in pixels], return_tensors="pt")
    np.testing.assert_array_equal(processed["pixel_values"], patches(pixels).flatten(0, 1))
    assert processed["image_grid_thw"].tolist() == [[1, 8, 8]] * len(pictures)


def test_prompts_have_the_promised_length_and_visual_share(tokenizer: Qwen2Tokenizer) -> None:
    for sample in tasks.samples("test", 60):
        length = len(_expanded(tokenizer, _rendered(tokenizer, sample.messages())))
        visual = TOKENS_PER_IMAGE * len(sample.images)
        assert 300 <= length <= 1000
        assert 0.5 <= visual / length <= 0.9
        assert 2 <= len(tokenizer.encode(sample.answer + "<|im_end|>")) <= 4
