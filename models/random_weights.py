"""Models with random weights and prompts of any length, for measurements in which only shapes matter."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from flowmm.errors import InputError
from flowmm.models.loading import choose_device, choose_dtype

TEXT_BETWEEN_IMAGES = 62
FIRST_TEXT_ID = 3


def _config(
    text: dict[str, Any], vision: dict[str, Any], first_special_token: int, mrope: tuple[int, int, int], theta: float
) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config=text
        | {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": list(mrope)}},
        vision_config=vision | {"in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2},
        tie_word_embeddings=text["tie_word_embeddings"],
        vision_start_token_id=first_special_token,
        vision_end_token_id=first_special_token + 1,
        image_token_id=first_special_token + 2,
        video_token_id=first_special_token + 3,
    )


def _small(layers: int, hidden: int, heads: int, kv_heads: int) -> Qwen2_5_VLConfig:
    """Head dimension ``hidden / heads``, MLP of 2.75 times the hidden size, a vision tower of one layer."""
    head_dim = hidden // heads
    text = {
        "vocab_size": 1000,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 4,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [],
        "window_size": 64,
    }
    return _config(text, vision, 990, (head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16), 10000.0)


def _qwen_7b() -> Qwen2_5_VLConfig:
    """The shape of Qwen2.5-VL-7B-Instruct."""
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "patch_size": 14,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
    }
    return _config(text, vision, 151652, (16, 24, 24), 1000000.0)


SHAPES = {
    "tiny": lambda: _small(layers=2, hidden=64, heads=4, kv_heads=2),
    "small": lambda: _small(layers=8, hidden=512, heads=8, kv_heads=2),
    "medium": lambda: _small(layers=10, hidden=1024, heads=16, kv_heads=4),
    "qwen2.5-vl-7b": _qwen_7b,
}


def random_model(
    shape: str = "small", *, device: str = "cpu", dtype: str = "fp32", seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of a shape in :data:`SHAPES`; sdpa attention, eval mode.

    Args:
        device, dtype: as for :func:`flowmm.models.load_model`; ``auto`` is fp32.

    Raises:
        InputError: no such shape, device or dtype.
    """
    weights, place = choose_dtype(dtype), choose_device(device)
    if shape not in SHAPES:
        raise InputError(f"{shape!r}: expected one of the shapes {', '.join(SHAPES)}")
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(weights if isinstance(weights, torch.dtype) else torch.float32)
        with torch.device(place):
            return Qwen2_5_VLForConditionalGeneration(SHAPES[shape]()).eval()
    finally:
        torch.set_default_dtype(before)


def image_prompt(
    model: Any, length: int, batch: int = 1, side: int | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs ``[batch, length]`` on the device of `model`: images with 62 text tokens before each, then text.

    Args:
        side: an image has ``side * side`` visual tokens; by default 16 * 16, or less for a prompt too short for that.

    Raises:
        InputError: `length` is too short for an image.
    """
    config = model.config
    if side is None:
        side = 16 if length >= 512 else 4
    per_image = side * side + 2 + TEXT_BETWEEN_IMAGES
    if length <= per_image:
        raise InputError(f"a prompt of {length} tokens is too short; expected more than {per_image}")
    images = max(1, length // per_image - 1)
    visual = [config.vision_start_token_id, *[config.image_token_id] * (side * side), config.vision_end_token_id]
    row = [*range(FIRST_TEXT_ID, FIRST_TEXT_ID + TEXT_BETWEEN_IMAGES), *visual] * images
    row += [FIRST_TEXT_ID + place % 900 for place in range(length - len(row))]
    tokens = torch.tensor([row] * batch)
    vision = config.vision_config
    merge = vision.spatial_merge_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(
        images * merge**2 * side * side, patch, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == config.image_token_id).int(),
        "pixel_values": pixels.repeat(batch, 1).to(model.dtype),
        "image_grid_thw": torch.tensor([[1, merge * side, merge * side]] * images * batch),
    }
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}
