"""Which tokens are visual: read from the token ids, never from counts or positions."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from flowmm.errors import UnsupportedModelError


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The language model's part of `config`: the one with layers, heads and KV heads."""
    return config.get_text_config(decoder=True)


def visual_token_ids(config: Any) -> tuple[int, ...]:
    """Ids that stand for visual features in `config`'s token sequences (image, then video).

    Raises:
        UnsupportedModelError: the configuration names no such id.
    """
    names = ("image_token_id", "video_token_id")
    ids = tuple(token for name in names if (token := getattr(config, name, None)) is not None)
    if not ids:
        raise UnsupportedModelError(
            f"configuration of model type {getattr(config, 'model_type', None)!r} names no visual tokens; expected "
            f"{' or '.join(names)}, as vision-language models have"
        )
    return ids


def visual_mask(config: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """True where a token stands for a visual feature.

    Args:
        config: the whole model's configuration (not its text part).
        input_ids: ``[B, L]`` integers.

    Returns:
        ``[B, L]`` bool on the device of `input_ids`. Padding and vision start/end markers are False.

    Raises:
        UnsupportedModelError: `config` names no visual tokens.
    """
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in visual_token_ids(config):
        mask |= input_ids == token
    return mask
