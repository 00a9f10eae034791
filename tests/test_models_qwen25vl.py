"""Qwen2.5-VL prompts: expected ids, the same as transformers' own processor, padding, markers, visual tokens."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_checkpoint import image_bytes, tiny_image, write_checkpoint
from transformers import PreTrainedConfig, Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin

from flowmm.errors import InputError, UnsupportedModelError
from flowmm.models import LoadedModel, build_messages, load_model, text_config, visual_mask

RED, BLUE = tiny_image(), tiny_image(40, 40, "blue")
START, END, PAD_IMAGE = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-vl")), dtype="fp32", device="cpu")


def rendered(loaded: LoadedModel, messages: Any) -> str:
    return str(loaded.tokenizer.decode(loaded.build_inputs(messages)["input_ids"][0]))


def test_prompt_ids_are_those_of_the_written_out_prompt(loaded: LoadedModel) -> None:
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{START}{PAD_IMAGE * 6}{END}{START}{PAD_IMAGE * 25}{END}Which?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    inputs = loaded.build_inputs(build_messages("Which?", [RED, BLUE], system="Be brief."))
    assert inputs["input_ids"].tolist() == [loaded.tokenizer(expected)["input_ids"]]
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 10, 10]]
    assert inputs["pixel_values"].shape == (4 * 6 + 10 * 10, 3 * 2 * 4 * 4)
    assert inputs["attention_mask"].all()


def test_images_stand_where_their_placeholders_stood(loaded: LoadedModel) -> None:
    messages = build_messages("a <image> b <image> c", [RED, BLUE])
    image = [f"{START}{PAD_IMAGE * count}{END}" for count in (6, 25)]
    assert f"user\na {image[0]} b {image[1]} c<|im_end|>" in rendered(loaded, messages)


def test_images_over_several_turns_keep_their_order(loaded: LoadedModel) -> None:
    first = build_messages("one", [BLUE])
    messages = [*first, {"role": "assistant", "content": "blue"}, *build_messages("two", [RED])]
    assert loaded.build_inputs(messages)["image_grid_thw"].tolist() == [[1, 10, 10], [1, 4, 6]]


def test_all_ways_to_give_an_image_are_the_same(loaded: LoadedModel, tmp_path: Path) -> None:
    content = image_bytes(RED)
    (tmp_path / "red.png").write_bytes(content)
    url = {"url": "data:image/png;base64," + base64.b64encode(content).decode()}
    parts = [
        {"type": "image", "image": RED},
        {"type": "image", "image": content},
        {"type": "image", "image": str(tmp_path / "red.png")},
        {"type": "image_url", "image_url": {"url": str(tmp_path / "red.png")}},
        {"type": "image_url", "image_url": url},
    ]
    pixels = [loaded.build_inputs([{"role": "user", "content": [part]}])["pixel_values"] for part in parts]
    assert all(torch.equal(pixels[0], other) for other in pixels[1:])


def test_image_size_stays_within_the_processors_limits(loaded: LoadedModel) -> None:
    large = loaded.build_inputs(build_messages("?", [tiny_image(900, 500)]))
    small = loaded.build_inputs(build_messages("?", [tiny_image(3, 2)]))
    assert int(visual_mask(loaded.model.config, small["input_ids"]).sum()) >= 4
    assert 18 < int(visual_mask(loaded.model.config, large["input_ids"]).sum()) <= 36


def test_without_the_generation_prompt(loaded: LoadedModel) -> None:
    inputs = loaded.build_inputs(build_messages("Hi"), add_generation_prompt=False)
    assert loaded.tokenizer.decode(inputs["input_ids"][0]) == "<|im_start|>user\nHi<|im_end|>\n"


def test_text_only_prompts_have_no_pixels(loaded: LoadedModel) -> None:
    inputs = loaded.build_inputs(build_messages("Héllo 你好 🙂"))
    assert set(inputs) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert not inputs["mm_token_type_ids"].any()
    assert loaded.decode(inputs["input_ids"])[0] == "user\nHéllo 你好 🙂\nassistant\n"


def test_each_row_of_a_batch_is_its_own_single_build_padded_left(loaded: LoadedModel) -> None:
    rows = [
        build_messages("short"),
        build_messages("two <image> and <image>", [RED, BLUE]),
        build_messages("one", [RED]),
    ]
    batch = loaded.build_inputs(rows)
    singles = [loaded.build_inputs(row) for row in rows]
    for name, padding in (
        ("input_ids", loaded.tokenizer.pad_token_id),
        ("attention_mask", 0),
        ("mm_token_type_ids", 0),
    ):
        for row, single in enumerate(singles):
            length = single[name].shape[1]
            assert torch.equal(batch[name][row, -length:], single[name][0])
            assert (batch[name][row, :-length] == padding).all()
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(batch[name], torch.cat([single[name] for single in singles if name in single]))


def test_visual_mask_and_token_types_agree(loaded: LoadedModel) -> None:
    inputs = loaded.build_inputs([build_messages("two", [RED, BLUE]), build_messages("none")])
    mask = visual_mask(loaded.model.config, inputs["input_ids"])
    assert mask.dtype == torch.bool
    assert mask.sum(-1).tolist() == [6 + 25, 0]
    assert torch.equal(mask, inputs["mm_token_type_ids"] == 1)


def test_visual_mask_counts_video_tokens_and_refuses_text_models(loaded: LoadedModel) -> None:
    config = loaded.model.config
    ids = torch.tensor([[1, config.video_token_id, config.vision_start_token_id]])
    assert visual_mask(config, ids).tolist() == [[False, True, False]]
    with pytest.raises(UnsupportedModelError, match="names no visual tokens"):
        visual_mask(text_config(config), ids)
    assert isinstance(text_config(config), PreTrainedConfig)


@pytest.mark.parametrize("marker", [PAD_IMAGE, "<|video_pad|>", START, END])
@pytest.mark.parametrize("images", [[], [RED]])
def test_markers_in_text_are_refused(loaded: LoadedModel, marker: str, images: list[Image.Image]) -> None:
    with pytest.raises(InputError, match=r"messages\[0\]: the text contains .*pass images as image parts"):
        loaded.build_inputs(build_messages(f"what is {marker}?", images))
    with pytest.raises(InputError, match=r"messages\[0\]"):
        loaded.build_inputs([{"role": "system", "content": marker}, *build_messages("Hi")])


def test_a_marker_cannot_be_pieced_together(loaded: LoadedModel) -> None:
    parts = [{"type": "text", "text": "<|image"}, {"type": "text", "text": "_pad|>"}]
    with pytest.raises(InputError, match="text contains"):
        loaded.build_inputs([{"role": "user", "content": parts}])
    with pytest.raises(InputError, match="1 image or video tokens for 0 images"):
        loaded.build_inputs([{"role": "<|image_pad|>", "content": "Hi"}])


def test_images_that_cannot_be_cut_are_explained(loaded: LoadedModel) -> None:
    with pytest.raises(InputError, match="900 x 2 pixels cannot be cut into patches"):
        loaded.build_inputs(build_messages("?", [Image.new("RGB", (900, 2))]))


def test_a_template_that_refuses_is_an_input_error(loaded: LoadedModel) -> None:
    strict = replace(loaded, chat_template="{{ raise_exception('no system turn') }}")
    with pytest.raises(InputError, match=r"chat template cannot render .*no system turn"):
        strict.build_inputs(build_messages("Hi"))
    blind = replace(loaded, chat_template="{{ messages[0].role }}")
    with pytest.raises(InputError, match="0 image or video tokens for 1 images"):
        blind.build_inputs(build_messages("Hi", [RED]))


def test_inputs_equal_those_of_transformers_own_processor(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    check = ProcessorMixin.check_argument_for_proper_class

    def accept_none(self: ProcessorMixin, name: str, argument: Any) -> Any:
        return None if argument is None else check(self, name, argument)

    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", accept_none)
    processor: Any = Qwen2_5_VLProcessor(loaded.image_processor, loaded.tokenizer)
    conversations = [
        build_messages("see <image> and <image>!", [RED, BLUE], system="Short."),
        build_messages("x", [BLUE]),
    ]
    texts = [
        loaded.tokenizer.apply_chat_template(row, tokenize=False, add_generation_prompt=True) for row in conversations
    ]
    expected = processor(
        text=texts, images=[[RED, BLUE], [BLUE]], padding=True, padding_side="left", return_tensors="pt"
    )
    inputs = loaded.build_inputs(conversations)
    assert set(inputs) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(inputs[name], tensor), name
