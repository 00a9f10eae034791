"""A random-weight Qwen2.5-VL checkpoint directory in the real format, so that the real loading code runs offline."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny import tiny_config
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PATCH, MERGE = 4, 2
MIN_PIXELS, MAX_PIXELS = 8 * 8 * 4, 8 * 8 * 36

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Ids 0-255 are the bytes (any text is accepted, one token per byte); the special tokens follow."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {token: len(vocabulary) + index for index, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
    )


def write_checkpoint(directory: Path, *, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "5GB") -> Path:
    """Write config.json, safetensors, tokenizer, chat template, preprocessor_config.json; returns `directory`."""
    tokenizer = tiny_tokenizer()
    config: Any = tiny_config()
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.eos_token_id = tokenizer.eos_token_id
    config.text_config.pad_token_id = tokenizer.pad_token_id
    for name, token in (("image_token_id", 5), ("video_token_id", 6), ("vision_start_token_id", 3)):
        setattr(config, name, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[token]))
    config.vision_end_token_id = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[4])
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.12)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    return directory


def tiny_image(width: int = 24, height: int = 16, colour: str = "red") -> Image.Image:
    """A picture of one colour with a black corner; 24 x 16 pixels are 6 visual tokens."""
    image = Image.new("RGB", (width, height), colour)
    image.paste("black", (0, 0, width // 3, height // 2))
    return image


def image_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The contents of an image file of the given kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
