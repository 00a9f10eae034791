"""A random-weight Qwen2.5-VL of transformers' own class, small enough to build in milliseconds."""

from __future__ import annotations

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

VISION_START, VISION_END, IMAGE, VIDEO = 90, 91, 92, 93
VOCABULARY = 96


def tiny_config(layers: int = 4, heads: int = 4, kv_heads: int = 2, head_dim: int = 16) -> Qwen2_5_VLConfig:
    """Configuration with `layers` text layers and GQA groups of ``heads / kv_heads``."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": heads * head_dim,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16],
            },
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "out_hidden_size": heads * head_dim,
            "fullatt_block_indexes": [0, 1],
            "window_size": 64,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )


def tiny_model(seed: int = 0, **shape: int) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights (seeded), eval mode, fp32, sdpa attention; initialised wide enough that logits differ clearly."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(**shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.12)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def tiny_inputs(rows: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded model inputs; in `rows`, a positive number is that many text tokens, a negative one an image of
    that many visual tokens (a square number, one row of the grid per root)."""
    generator = torch.Generator().manual_seed(seed)
    token_rows, pixels, grids = [], [], []
    for segments in rows:
        tokens: list[int] = []
        for segment in segments:
            if segment > 0:
                tokens += torch.randint(3, VISION_START, (segment,), generator=generator).tolist()
                continue
            side = int((-segment) ** 0.5)
            assert side * side == -segment, "an image is a square of visual tokens"
            tokens += [VISION_START, *[IMAGE] * -segment, VISION_END]
            grids.append([1, 2 * side, 2 * side])
            pixels.append(torch.randn(4 * -segment, 3 * 2 * 4 * 4, generator=generator))
        token_rows.append(tokens)
    width = max(map(len, token_rows))
    ids = torch.tensor([[0] * (width - len(t)) + t for t in token_rows])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in token_rows])
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).int()}
    if pixels:
        inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
    return inputs
