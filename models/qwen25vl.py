"""Qwen2.5-VL: prompts and image features as transformers' own processor makes them, without torchvision.

A conversation is rendered by the checkpoint's chat template with one ``<|image_pad|>`` per image; each is then repeated
to the number of visual tokens of its image's grid. Text that contains a vision marker such as ``<|image_pad|>`` is
refused: the tokenizer cannot tell it from a real image, and escaping it would silently change the user's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedConfig, Qwen2_5_VLForConditionalGeneration

from flowmm.errors import InputError, ModelLoadError, UnsupportedModelError
from flowmm.models.messages import Conversation, open_conversation
from flowmm.models.visual import visual_token_ids

_MARKER_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


class Qwen25VL:
    """The family of ``Qwen/Qwen2.5-VL-*``, and of the embedded model."""

    name = "qwen25vl"
    model_type = "qwen2_5_vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"

    def load_weights(self, source: str, **options: Any) -> tuple[Any, dict[str, Any]]:
        """`options` are those of ``from_pretrained``. Returns the model and transformers' loading report."""
        load: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained
        return load(source, output_loading_info=True, use_safetensors=True, **options)

    def load_image_processor(self, source: str, **options: Any) -> Any:
        """The PIL image processor, also where torchvision is installed: plans must not depend on what is installed.

        Raises:
            UnsupportedModelError: this transformers has no PIL image processor.
        """
        try:
            from transformers import Qwen2VLImageProcessorPil
        except ImportError as error:
            raise UnsupportedModelError(
                "transformers has no Qwen2VLImageProcessorPil; install transformers>=5.16,<6"
            ) from error
        return Qwen2VLImageProcessorPil.from_pretrained(source, **options)

    def check_parts(self, config: PreTrainedConfig, tokenizer: Any, image_processor: Any) -> None:
        """Raise ModelLoadError if the tokenizer lacks the vision markers or the image processor cuts other patches."""
        vision = config.vision_config
        special = set(tokenizer.get_added_vocab().values())
        for name in _MARKER_IDS:
            if getattr(config, name) not in special:
                raise ModelLoadError(
                    f"the tokenizer has no special token with the id {getattr(config, name)} ({name} in config.json); "
                    f"expected the tokenizer files of this checkpoint: download the directory again"
                )
        found = (image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size)
        expected = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        if found != expected:
            raise ModelLoadError(
                f"preprocessor_config.json has patch_size, merge_size, temporal_patch_size {found}, the vision tower "
                f"in config.json {expected}; expected the files of one checkpoint: download the directory again"
            )

    def build_inputs(
        self,
        config: PreTrainedConfig,
        tokenizer: Any,
        image_processor: Any,
        conversations: Sequence[Conversation],
        *,
        chat_template: str | None,
        add_generation_prompt: bool,
    ) -> dict[str, torch.Tensor]:
        """Left-padded inputs of a batch, on the CPU.

        Returns:
            ``input_ids``, ``attention_mask`` and ``mm_token_type_ids`` (0 text, 1 image) ``[B, L]``; with images also
            ``pixel_values [patches, channels * temporal * patch**2]`` fp32 and ``image_grid_thw [images, 3]``, images
            in row order.

        Raises:
            InputError: malformed messages, unusable images, vision markers in a text.
        """
        rows: list[list[int]] = []
        pixels, grids = [], []
        for conversation in conversations:
            messages, images = open_conversation(conversation)
            _refuse_vision_markers(config, tokenizer, messages)
            ids = _render(tokenizer, messages, chat_template, add_generation_prompt)
            counts: list[int] = []
            if images:
                features = _image_features(image_processor, images)
                pixels.append(features["pixel_values"])
                grids.append(features["image_grid_thw"])
                counts = (features["image_grid_thw"].prod(-1) // image_processor.merge_size**2).tolist()
            rows.append(_expand_placeholders(config, ids, counts))
        inputs = _left_pad(rows, _padding_id(tokenizer))
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).long() * inputs["attention_mask"]
        if pixels:
            inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}
        return inputs


def _refuse_vision_markers(config: PreTrainedConfig, tokenizer: Any, messages: list[dict[str, Any]]) -> None:
    markers = tokenizer.convert_ids_to_tokens([getattr(config, name) for name in _MARKER_IDS])
    for position, message in enumerate(messages):
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        for marker in markers:
            if marker in "".join(texts):
                raise InputError(
                    f"messages[{position}]: the text contains {marker!r}, which the model reads as part of an image; "
                    f"remove it from the text and pass images as image parts"
                )


def _render(tokenizer: Any, messages: list[dict[str, Any]], chat_template: str | None, add_prompt: bool) -> list[int]:
    """Token ids of the conversation, one image token per image."""
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=add_prompt
        )
    except Exception as error:  # templates are programs: jinja's errors, and the template's own refusals
        raise InputError(f"the model's chat template cannot render these messages: {error}") from error
    return tokenizer(text)["input_ids"]


def _image_features(image_processor: Any, images: list[Image.Image]) -> Any:
    try:
        return image_processor(images=images, return_tensors="pt")
    except ValueError as error:
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        factor = image_processor.patch_size * image_processor.merge_size
        resizes = "resizes images" if image_processor.do_resize else f"expects multiples of {factor} pixels"
        raise InputError(
            f"images of {sizes} pixels cannot be cut into patches: {error}; the image processor {resizes}; "
            f"crop or resize them first"
        ) from error


def _expand_placeholders(config: PreTrainedConfig, ids: list[int], counts: list[int]) -> list[int]:
    """Repeat the n-th image token ``counts[n]`` times.

    The comparison with the number of images also catches a marker pieced together from two parts of a message.
    """
    visual = set(visual_token_ids(config))
    places = [place for place, token in enumerate(ids) if token in visual]
    if len(places) != len(counts) or any(ids[place] != config.image_token_id for place in places):
        raise InputError(
            f"the rendered prompt has {len(places)} image or video tokens for {len(counts)} images; expected one each: "
            f"either a text contains a vision marker, or the chat template drops image parts of this message's role"
        )
    expanded: list[int] = []
    start = 0
    for place, count in zip(places, counts, strict=True):
        expanded += ids[start:place] + [config.image_token_id] * count
        start = place + 1
    return expanded + ids[start:]


def _padding_id(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _left_pad(rows: list[list[int]], padding: int) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[padding] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
