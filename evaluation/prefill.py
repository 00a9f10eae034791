"""One exact prefill per prompt; every compressed cache of that prompt is then made from its captured states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowmm.evaluation.protocols import Trial
from flowmm.models import text_config, visual_mask
from flowmm.plans import MethodParameters, Mode, Plan
from flowmm.runtime import CompressionSettings, FlowCache
from flowmm.runtime.attention import attached
from flowmm.runtime.cache import Prompt, uniform_ratios
from flowmm.runtime.flow import sampled_rho
from flowmm.runtime.prompt import PromptLayout
from flowmm.runtime.rotary import Rotary


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

    def cache(self, plan: Plan, method: MethodParameters, budget: float) -> FlowCache:
        """The cache that ``flowmm.compress`` would have left behind for this prompt."""
        settings = CompressionSettings(
            method=method,
            modes=tuple(self._mode(layer.index, layer.mode, method.theta) for layer in plan.layers),
            layer_ratios=plan.layer_budgets,
            budget=budget,
        )
        return FlowCache.from_states(settings, self.layout, self.states, self.scaling, self.rotary)

    def full_cache(self) -> FlowCache:
        """The uncompressed cache."""
        layers = len(self.states)
        settings = CompressionSettings(
            MethodParameters(), modes=("intra",) * layers, layer_ratios=uniform_ratios(layers), budget=1.0
        )
        return FlowCache.from_states(settings, self.layout, self.states, self.scaling, self.rotary)

    def hide_last(self, cache: FlowCache, count: int) -> None:
        """Make the prompt's last `count` tokens invisible in `cache`, because they are about to be fed again.

        An entry that absorbed others is left alone; one that did not equals the token's own states bit for bit.
        """
        if count == 0:
            return
        for layer, (_, key, value) in zip(cache.states, self.states, strict=True):
            keys, values, positions = layer.keys, layer.values, layer.positions
            if positions is None or keys is None or values is None:
                layer.crop(-count)
                continue
            at = positions[..., None].expand(*positions.shape, key.shape[-1])
            untouched = keys.eq(key.gather(2, at)).all(-1) & values.eq(value.gather(2, at)).all(-1)
            hidden = untouched & (positions >= self.layout.lengths[0] - count)
            bias = torch.zeros(hidden.shape, device=hidden.device) if layer.bias is None else layer.bias
            layer.bias = bias.masked_fill(hidden, float("-inf"))

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
    def _sampled_rho(self) -> list[Tensor]:
        # The row sample of a real run: it depends on the settings' defaults alone.
        settings = CompressionSettings(
            MethodParameters(), modes=("online",), layer_ratios=uniform_ratios(1), budget=1.0
        )
        rows = Prompt.of(self.layout, settings).rho_rows
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
        self.states.append((query, key, value))
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
