"""Attention-output error per layer: what a compressed cache changes in a layer that is asked just the same.

Queries, and the keys and values of the tokens fed after the compression, are those of the full cache's run. So an error
is a layer's own and not inherited from the layers below.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flowmm.errors import FlowmmError
from flowmm.runtime import FlowCache
from flowmm.runtime.attention import attached, attend_compressed


@dataclass(frozen=True)
class Asked:
    """What one layer of the full cache was asked, and what it answered.

    Attributes:
        query: ``[1, Hq, q, D]`` of the fed tokens, fp32.
        key, value: ``[1, Hkv, q, D]`` of the fed tokens.
        scaling: softmax scale.
        output: ``[1, q, Hq, D]`` fp32, before the output projection.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    output: Tensor


class _Recorder:
    """A flow that lets a cache answer and notes what each layer was asked."""

    def __init__(self, cache: FlowCache) -> None:
        self.layers: list[Asked] = []
        self._cache = cache

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        base: Callable[..., tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, Tensor | None]:
        new = query.shape[2]
        output = attend_compressed(query.float(), key.float(), value.float(), None, scaling)
        self.layers.append(Asked(query.float(), key[:, :, -new:], value[:, :, -new:], scaling, output))
        return self._cache.attend(layer, query, key, value, mask, scaling, base)


@contextmanager
def recording(model: Any, full: FlowCache) -> Generator[list[Asked]]:
    """The list yielded holds, after one forward call with the full cache, what each layer was asked."""
    recorder = _Recorder(full)

    def pick(kwargs: dict[str, Any]) -> _Recorder:
        if kwargs.get("past_key_values") is not full:
            raise FlowmmError("while a cache is recorded, no other can be fed")
        ids = kwargs["input_ids"]
        full.begin_forward(torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool))
        return recorder

    with attached(model, pick):
        yield recorder.layers


@torch.no_grad()
def attention_errors(asked: list[Asked], cache: FlowCache, last: int) -> Tensor:
    """Relative error ``[R, layers]`` of each layer's attention output under each row of a cache, in fp32.

    ``|o' - o| / |o|`` over heads and channels, mean over the `last` fed tokens; o' is the output on the compressed
    entries, o on all of them.

    Args:
        asked: of each layer, see :func:`recording`.
        cache: ``R`` rows that hold the compressed prompt and nothing behind it.
    """
    errors = []
    for layer, full in zip(cache.states, asked, strict=True):
        prompt_keys, prompt_values = layer.first_entries(layer.kept)
        rows, new = prompt_keys.shape[0], full.query.shape[2]
        keys, values = (
            torch.cat([prompt, fed.expand(rows, -1, -1, -1)], dim=2).float()
            for prompt, fed in ((prompt_keys, full.key), (prompt_values, full.value))
        )
        bias = None if layer.bias is None else pad(layer.bias.float(), (0, new))
        output = attend_compressed(full.query.expand(rows, -1, -1, -1), keys, values, bias, full.scaling)
        wanted, found = (part[:, -last:].flatten(2) for part in (full.output, output))
        errors.append(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).mean(-1))
    return torch.stack(errors, dim=1)
