"""A Qwen2.5-VL with random weights, for measurements in which only shapes matter."""

from __future__ import annotations

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

VISION_START, VISION_END, IMAGE, VIDEO = 990, 991, 992, 993
TEXT_BETWEEN = 62


def random_model(
    layers: int = 8, hidden: int = 512, heads: int = 8, kv_heads: int = 2, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """fp32, sdpa, eval mode; head dimension ``hidden / heads``, MLP of 2.75 times the hidden size, a small vision
    tower."""
    head_dim = hidden // heads
    torch.manual_seed(seed)
    text = {
        "vocab_size": 1000,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16],
        },
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [],
        "window_size": 64,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def image_prompt(length: int, side: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs ``[1, length]``: images of ``side * side`` visual tokens with 62 text tokens before each, then text."""
    generator = torch.Generator().manual_seed(seed)
    per_image = side * side + 2 + TEXT_BETWEEN
    images = max(1, length // per_image - 1)
    ids: list[int] = []
    for _ in range(images):
        ids += [*range(3, 3 + TEXT_BETWEEN), VISION_START, *[IMAGE] * (side * side), VISION_END]
    ids += [3 + place % 900 for place in range(length - len(ids))]
    tokens = torch.tensor([ids])
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == IMAGE).int(),
        "pixel_values": torch.randn(images * 4 * side * side, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]] * images),
    }
