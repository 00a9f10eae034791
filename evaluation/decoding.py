"""Decoding on caches that were made elsewhere: many compressed caches of one prompt are the rows of one batch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowmm.errors import FlowmmError
from flowmm.runtime import FlowCache
from flowmm.runtime.attention import attached


@dataclass(frozen=True)
class Decoded:
    """Greedy answers: ``logits [R, V]`` fp32 at the first answer position, ``tokens [R, steps]``."""

    logits: Tensor
    tokens: Tensor


@contextmanager
def reading_caches(model: Any) -> Generator[None]:
    """Inside the block, forward calls of `model` with a :class:`FlowCache` read that cache."""

    def pick(kwargs: dict[str, Any]) -> FlowCache:
        cache, ids = kwargs.get("past_key_values"), kwargs["input_ids"]
        if not isinstance(cache, FlowCache):
            raise FlowmmError("decoding needs a FlowCache as past_key_values")
        cache.begin_forward(torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool))
        return cache

    with attached(model, pick):
        yield


@torch.no_grad()
def feed(model: Any, cache: FlowCache, ids: Tensor, positions: Tensor, keep: int = 1) -> Tensor:
    """Logits ``[R, keep, V]`` fp32 of the last `keep` of the tokens `ids` ``[R, q]`` at `positions` ``[3, 1, q]``."""
    rows = ids.shape[0]
    output = model(
        input_ids=ids, position_ids=positions.expand(3, rows, -1), past_key_values=cache, logits_to_keep=keep
    )
    return output.logits.float()


def answer_greedily(model: Any, cache: FlowCache, continuation: Tensor, positions: Tensor, steps: int) -> Decoded:
    """Feed a continuation and decode `steps` tokens.

    Args:
        continuation: ``[R, q]`` ids, one row per row of the cache.
        positions: ``[3, 1, q]`` of the continuation; the answer goes on from there.
        steps: tokens to decode; a row that ends earlier goes on and is cut by the caller.
    """
    first = feed(model, cache, continuation, positions)[:, -1]
    tokens = [first.argmax(-1)]
    place = positions[..., -1:]
    for _ in range(steps - 1):
        place = place + 1
        tokens.append(feed(model, cache, tokens[-1][:, None], place)[:, -1].argmax(-1))
    return Decoded(first, torch.stack(tokens, dim=1))


def divergence(full: Tensor, compressed: Tensor) -> Tensor:
    """KL(full || compressed) in nats over the last dimension of two tensors of logits ``[..., V]``, in fp32."""
    reference = full.float().log_softmax(-1)
    return (reference.exp() * (reference - compressed.float().log_softmax(-1))).sum(-1).clamp(min=0)
