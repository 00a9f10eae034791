"""The recorder: sees every layer's attention in one forward pass and keeps a handful of numbers per head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowmm.models import visual_mask
from flowmm.runtime.attention import attached
from flowmm.runtime.flow import attention_with_class_mass, rho_per_head, rho_without_sinks, uniform_rho
from flowmm.runtime.prompt import PromptLayout

# Tokens before the first image that may act as attention sinks; their columns get a class of their own.
MAX_SINKS = 4


@dataclass(frozen=True)
class LayerFlow:
    """Flow of one layer on one prompt, per query head ``[Hq]`` (fp64 on the host).

    Attributes:
        rho: eq. 6-7, share of the attention mass that crosses modalities.
        rho_nosink: the same without the sink rows and columns.
        text_mass_of_visual: mean mass of visual rows on text columns (0 without visual rows).
        visual_mass_of_text: mean mass of text rows on visual columns (0 without text rows).
        sink_mass: mean mass of all rows on the sink columns.
    """

    rho: list[float]
    rho_nosink: list[float]
    text_mass_of_visual: list[float]
    visual_mass_of_text: list[float]
    sink_mass: list[float]


@dataclass(frozen=True)
class PromptFlow:
    """One calibration prompt: its layout and the flow of every layer.

    ``uniform_rho`` is the chance level: rho of uniform causal attention over the same layout.
    """

    tokens: int
    visual_tokens: int
    images: int
    sinks: int
    uniform_rho: float
    layers: list[LayerFlow]


class FlowRecorder:
    """A flow that runs the attention itself, with indicator columns, and notes each layer's class masses."""

    def __init__(self, layout: PromptLayout, sinks: int) -> None:
        self.layout = layout
        self.sinks = sinks
        sink_columns = layout.valid & (layout.rank < sinks)
        self._classes = torch.stack([layout.visual, sink_columns], dim=-1)
        self.masses: list[dict[str, Tensor]] = []

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        base: Callable[[], Any],
    ) -> tuple[Tensor, None]:
        """The layer's output, from the call that also gives the masses; `base` is never run."""
        output, masses = attention_with_class_mass(query, key, value, self._classes, mask, scaling)
        visual, sink = masses.double().unbind(-1)
        layout = self.layout
        text_rows = layout.valid & ~layout.visual
        self.masses.append(
            {
                "rho": rho_per_head(visual, layout),
                "rho_nosink": rho_without_sinks(visual, sink, layout, self.sinks),
                "text_mass_of_visual": _mean_over(1 - visual, layout.visual),
                "visual_mass_of_text": _mean_over(visual, text_rows),
                "sink_mass": _mean_over(sink, layout.valid),
            }
        )
        return output.transpose(1, 2).contiguous(), None


def _mean_over(rows: Tensor, chosen: Tensor) -> Tensor:
    """Mean of ``[B, Hq, L]`` over the chosen rows ``[B, L]``; 0 where none is."""
    return torch.where(chosen[:, None], rows, 0.0).sum(-1) / chosen.sum(-1).clamp(min=1)[:, None]


@torch.no_grad()
def record_flow(model: Any, inputs: dict[str, Tensor]) -> PromptFlow:
    """Flow of every layer on one prompt, in one forward pass with fused attention.

    Args:
        model: a transformers vision-language model, sdpa or eager.
        inputs: of one prompt, batch size 1; padding is allowed and ignored.
    """
    ids = inputs["input_ids"]
    valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    layout = PromptLayout.from_masks(visual_mask(model.config, ids), valid)
    recorder = FlowRecorder(layout, _count_sinks(layout))
    with attached(model, lambda _: recorder):
        model(**inputs, use_cache=False, logits_to_keep=1)
    columns = [{name: per_head[0].tolist() for name, per_head in layer.items()} for layer in recorder.masses]
    return PromptFlow(
        tokens=layout.lengths[0],
        visual_tokens=int(layout.visual.sum()),
        images=len(inputs.get("image_grid_thw", ())),
        sinks=recorder.sinks,
        uniform_rho=float(uniform_rho(layout)[0]),
        layers=[LayerFlow(**layer) for layer in columns],
    )


def _count_sinks(layout: PromptLayout) -> int:
    """Text tokens before the first visual one, at most :data:`MAX_SINKS`."""
    first_visual = torch.where(layout.visual.any(), (layout.rank + (~layout.visual) * layout.valid.shape[1]).min(), 0)
    return min(MAX_SINKS, int(first_visual))
