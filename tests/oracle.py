"""The oracle: the same model on its full cache, with attention masked (and merged entries written back) by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from flowmm.runtime.attention import attached
from flowmm.runtime.cache import FlowCache


class MaskedFullCache:
    """Decodes over every prompt entry, but sees only those a compressed cache kept, with its merged keys and values."""

    def __init__(self, compressed: FlowCache) -> None:
        self.layers = [
            (layer.positions, layer.keys, layer.values, layer.bias, layer.prompt_length) for layer in compressed.states
        ]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, base: Callable[[], Any]
    ) -> tuple[Tensor, None]:
        positions, kept_key, kept_value, kept_bias, prompt = self.layers[layer]
        if key.shape[2] == query.shape[2]:
            return base()
        assert positions is not None
        assert kept_key is not None
        assert kept_value is not None
        key, value = key.clone(), value.clone()
        batch, heads = key.shape[:2]
        bias = torch.full(key.shape[:3], float("-inf"))
        bias[..., prompt:] = 0
        for row in range(batch):
            for head in range(heads):
                for slot, position in enumerate(positions[row, head].tolist()):
                    logit = 0.0 if kept_bias is None else kept_bias[row, head, slot].item()
                    if logit == float("-inf"):
                        continue
                    key[row, head, position] = kept_key[row, head, slot]
                    value[row, head, position] = kept_value[row, head, slot]
                    bias[row, head, position] = logit
        return _plain_attention(query, key, value, bias, scaling), None


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    group, new = query.shape[1] // key.shape[1], query.shape[2]
    key, value, bias = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value, bias))
    scores = query @ key.transpose(-1, -2) * scaling + bias[:, :, None]
    future = torch.ones(new, new, dtype=torch.bool).triu(1)
    scores[..., -new:] = scores[..., -new:].masked_fill(future, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def oracle_generate(model: Any, compressed: FlowCache, *turns: dict[str, Tensor], **options: Any) -> Any:
    """``model.generate`` for one turn after another on one masked full cache; returns the last turn's output."""
    oracle = MaskedFullCache(compressed)
    cache, output = DynamicCache(config=model.config.get_text_config()), None
    with attached(model, lambda _: oracle):
        for turn in turns:
            output = model.generate(**turn, **options, past_key_values=cache)
    return output
