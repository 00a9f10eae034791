"""Replaying a prompt: prefill it once, make any compressed cache of it from the captured states, and decode on that.

Measuring many compressions of one prompt costs one prefill and some decode steps this way; profiler and evaluation
both live on it. A replayed cache equals the one that ``flowmm.compress`` leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowmm.errors import FlowmmError, InputError
from flowmm.models import LoadedModel, text_config, visual_mask
from flowmm.plans import MethodParameters, Mode, Plan
from flowmm.runtime.attention import attached
from flowmm.runtime.budgets import all_entries, planned_entries
from flowmm.runtime.cache import FlowCache
from flowmm.runtime.flow import RowSample, sampled_rho
from flowmm.runtime.pivots import entries_at
from flowmm.runtime.prompt import PromptLayout
from flowmm.runtime.rotary import Rotary
from flowmm.runtime.settings import CompressionSettings
from flowmm.runtime.shared import Shared

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversations:
    """What is compressed and what is asked in all; `opened`: the compressed part ends with an assistant's opening.

    `fed_again` tokens at the prompt's end are fed once more after the compression. `others` ask something else in all,
    after the same compressed part.
    """

    compressed: list[Message]
    whole: list[Message]
    opened: bool
    fed_again: int = 0
    others: tuple[list[Message], ...] = ()


@dataclass(frozen=True)
class Trial:
    """A case under a protocol, as tokens.

    Attributes:
        inputs: model inputs of the compressed prompt, ``[1, L]`` each, with its images.
        continuation: ``[1, q]`` ids fed after the compression.
        prompt_positions: ``[3, 1, L]`` M-RoPE positions.
        positions: ``[3, 1, q]`` of the continuation.
        fed_again: the continuation starts with so many of the prompt's last tokens.
        others: ``[1, q]`` each, continuations that may be fed instead, from the same position on.
    """

    inputs: dict[str, Tensor]
    continuation: Tensor
    prompt_positions: Tensor
    positions: Tensor
    fed_again: int
    others: tuple[Tensor, ...] = ()

    @property
    def prompt_length(self) -> int:
        return self.inputs["input_ids"].shape[1]


def build_trial(model: LoadedModel, chat: Conversations) -> Trial:
    """Tokens of a pair of conversations.

    Raises:
        InputError: images behind the compressed prompt.
    """
    ids = model.build_inputs(chat.compressed, add_generation_prompt=chat.opened)["input_ids"][0]
    inputs = model.build_inputs(chat.whole)
    wholes = [inputs["input_ids"], *(model.build_inputs(other)["input_ids"] for other in chat.others)]
    # All continue one prompt, however the tokenizer joins what they begin with to its end.
    cut = min(_common_prefix(ids.tolist(), whole[0].tolist()) for whole in wholes)
    continuation, *others = (whole[:, cut - chat.fed_again :] for whole in wholes)
    if any(bool(visual_mask(model.model.config, fed).any()) for fed in (continuation, *others)):
        raise InputError("images behind the compressed prompt are not supported; put them in front")
    prompt = {name: tensor[:, :cut] if name in _PER_TOKEN else tensor for name, tensor in inputs.items()}
    positions = _positions(model, inputs)
    fed = positions[..., cut - chat.fed_again :]
    return Trial(prompt, continuation, positions[..., :cut], fed, chat.fed_again, tuple(others))


_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    different = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(different, min(len(first), len(second)))


def _positions(model: LoadedModel, inputs: dict[str, Tensor]) -> Tensor:
    """``[3, 1, L + q]``; given to every forward call, because a model keeps the offsets of its latest prompt only."""
    ids = inputs["input_ids"]
    if "image_grid_thw" not in inputs:
        return torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
    host: Any = model.model.model
    positions, _ = host.get_rope_index(
        ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"], attention_mask=inputs["attention_mask"]
    )
    return positions


@dataclass(frozen=True)
class Prefill:
    """What a prompt's prefill computed.

    Attributes:
        layout: modality, padding, length.
        states: query ``[1, Hq, L, D]``, key and value ``[1, Hkv, L, D]`` of each layer, after RoPE.
        scaling: softmax scale.
        rotary: what turned the keys.
    """

    layout: PromptLayout
    states: tuple[tuple[Tensor, Tensor, Tensor], ...]
    scaling: float
    rotary: Rotary | None

    def settings(self, plan: Plan, method: MethodParameters, budget: float) -> CompressionSettings:
        """What ``flowmm.compress`` would use for this prompt; an ``online`` layer's mode is decided here, once."""
        entries = planned_entries(plan.layer_budgets, budget)
        return CompressionSettings(method, self.modes(plan, method), entries, layer_methods=plan.layer_methods(method))

    def modes(self, plan: Plan, method: MethodParameters | None = None) -> tuple[Mode, ...]:
        """Each layer's mode on this prompt; `method` is the plan's unless another is asked for."""
        method = plan.method if method is None else method
        return tuple(self._mode(layer, mode, method.theta) for layer, mode in enumerate(plan.layer_modes(method)))

    def cache(self, settings: CompressionSettings) -> FlowCache:
        """The cache that a run with these settings would have left behind."""
        return FlowCache.from_states(settings, self.layout, self.states, self.scaling, self.rotary, self._shared)

    def full_cache(self) -> FlowCache:
        """The uncompressed cache."""
        layers = len(self.states)
        modes: tuple[Mode, ...] = ("intra",) * layers
        return self.cache(CompressionSettings(MethodParameters(), modes, all_entries(layers)))

    def hide_last(self, cache: FlowCache, count: int) -> FlowCache:
        """`cache` with the prompt's last `count` tokens made invisible, because they are about to be fed again.

        An entry that absorbed others is left alone; one that did not equals the token's own states bit for bit.
        """
        if count == 0:
            return cache
        for layer, (_, key, value) in zip(cache.states, self.states, strict=True):
            keys, values, positions = layer.keys, layer.values, layer.positions
            if positions is None or keys is None or values is None:
                layer.crop(-count)
                continue
            # Entries are in ascending position, so the tokens fed again can only be the last ones.
            newest = positions[..., -count:]
            last = slice(-newest.shape[-1], None)
            same_key = keys[:, :, last].eq(entries_at(key, newest)).all(-1)
            same_value = values[:, :, last].eq(entries_at(value, newest)).all(-1)
            hidden = same_key & same_value & (newest >= self.layout.lengths[0] - count)
            bias = keys.new_zeros(positions.shape) if layer.bias is None else layer.bias.clone()
            bias[..., last] = bias[..., last].masked_fill(hidden, float("-inf"))
            layer.bias = bias
        return cache

    def forget_shared(self) -> None:
        """Free what the caches made so far have in common; later ones compute it again."""
        vars(self).pop("_shared", None)

    @property
    def full_bytes(self) -> int:
        """Bytes of the uncompressed keys and values."""
        return sum(key.nbytes + value.nbytes for _, key, value in self.states)

    def _mode(self, layer: int, planned: Mode, theta: float) -> Mode:
        """What an ``online`` layer decides for this prompt; every method asks, so rho is measured once."""
        if planned != "online":
            return planned
        return "cross" if bool(self._sampled_rho[layer] > theta) else "intra"

    @cached_property
    def _shared(self) -> list[Shared]:
        return [Shared() for _ in self.states]

    @cached_property
    def _sampled_rho(self) -> list[Tensor]:
        # The row sample of a real run, by the settings' defaults.
        rows = RowSample.draw(self.layout, CompressionSettings.rho_rows, CompressionSettings.seed)
        return [sampled_rho(query, key, self.layout, rows, self.scaling).rho for query, key, _ in self.states]


class _Capture:
    """A flow that notes each layer's states and leaves the attention to the host."""

    def __init__(self, sections: list[int]) -> None:
        self.states: list[tuple[Tensor, Tensor, Tensor]] = []
        self.scaling = 1.0
        self.rotary: Rotary | None = None
        self._sections = sections

    def see_rotary(self, cos: Tensor, sin: Tensor) -> None:
        self.rotary = Rotary.from_host(cos, sin, self._sections)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        base: Callable[[], tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, Tensor | None]:
        # Read many times, so worth a copy that lies in one piece.
        self.states.append((query.contiguous(), key.contiguous(), value.contiguous()))
        self.scaling = scaling
        return base()


@torch.no_grad()
def prefill(model: Any, trial: Trial) -> Prefill:
    """Run the trial's prompt through a transformers model, once.

    Raises:
        UnsupportedModelError: the text layers use an attention implementation other than sdpa or eager.
    """
    ids = trial.inputs["input_ids"]
    layout = PromptLayout.from_masks(visual_mask(model.config, ids), torch.ones_like(ids, dtype=torch.bool))
    capture = _Capture(text_config(model.config).rope_parameters.get("mrope_section", []))
    with attached(model, lambda _: capture, capture.see_rotary):
        model(**trial.inputs, position_ids=trial.prompt_positions, use_cache=False, logits_to_keep=1)
    return Prefill(layout, tuple(capture.states), capture.scaling, capture.rotary)


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
def feed(model: Any, cache: FlowCache, ids: Tensor, positions: Tensor, keep: int | Tensor = 1) -> Tensor:
    """Logits ``[R, K, V]`` fp32 of tokens `ids` ``[R, q]`` at `positions` ``[3, 1, q]``.

    Args:
        keep: the last so many of the tokens, or the places of those that are wanted, ``[K]`` long.
    """
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


def length_of_turn(host: Any, tokens: Tensor) -> int:
    """Tokens of ``[T]`` ids in front of the one that ends the turn."""
    ends = host.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return next((place for place, token in enumerate(tokens.tolist()) if token in ends), len(tokens))


def divergence(full: Tensor, compressed: Tensor) -> Tensor:
    """KL(full || compressed) in nats over the last dimension of two tensors of logits ``[..., V]``, in fp32."""
    reference = full.float().log_softmax(-1)
    return (reference.exp() * (reference - compressed.float().log_softmax(-1))).sum(-1).clamp(min=0)
