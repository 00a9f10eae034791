"""The recorder: sees every layer's attention in one forward pass and keeps a handful of numbers per head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowmm.models import visual_mask
from flowmm.profiler.flows import LayerFlow, PromptFlow
from flowmm.profiler.sinks import SINK_MASS, columns_as_classes, sink_candidates
from flowmm.runtime.attention import attached
from flowmm.runtime.flow import (
    INDICATOR_WIDTH,
    RowSample,
    attention_with_class_mass,
    rho_per_head,
    rho_without,
    sampled_rho,
    uniform_rho,
)
from flowmm.runtime.prompt import PromptLayout

# Tokens before the first image that may act as attention sinks; their columns get a class of their own.
MAX_SINKS = 4
# Visual columns and the first tokens take two of the indicator columns.
MAX_CANDIDATES = INDICATOR_WIDTH - 2
# One for all, so that every layer and every rank looks at the same rows of a prompt.
ROW_SEED = 0


class FlowRecorder:
    """A flow that runs the attention itself, with indicator columns, and notes each layer's class masses."""

    def __init__(self, layout: PromptLayout, sinks: int, rows: RowSample | None = None) -> None:
        self.layout = layout
        self.rows = rows
        self._first = layout.valid & (layout.rank < sinks)
        self._classes = torch.stack([layout.visual, self._first], dim=-1)
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
        candidates = sink_candidates(query, key, self.layout, scaling, MAX_CANDIDATES)
        classes = torch.cat([self._classes, columns_as_classes(candidates, value.shape[2])], dim=-1)
        output, masses = attention_with_class_mass(query, key, value, classes, mask, scaling)
        numbers = self._estimates(masses.double(), candidates)
        if self.rows is not None:
            estimate = sampled_rho(query, key, self.layout, self.rows, scaling)
            numbers |= {"sampled_rho": estimate.rho, "sampled_error": estimate.standard_error}
        self.masses.append(numbers)
        return output.transpose(1, 2).contiguous(), None

    def _estimates(self, masses: Tensor, candidates: Tensor) -> dict[str, Tensor]:
        layout = self.layout
        visual, first, of_candidates = masses[..., 0], masses[..., 1], masses[..., 2:]
        candidate_mass = _mean_over(of_candidates.mean(1).transpose(1, 2), layout.valid[:, None])
        is_sink = candidate_mass > SINK_MASS
        sink_is_visual = is_sink & layout.visual.gather(1, candidates.clamp(min=0))
        deleted = columns_as_classes(torch.where(is_sink, candidates, -1), visual.shape[-1]).any(-1)
        return {
            "rho": rho_per_head(visual, layout),
            "rho_nosink": rho_without(visual, first, layout, self._first),
            "rho_nosink_auto": rho_without(
                visual - of_candidates @ sink_is_visual[0].double(),
                of_candidates @ is_sink[0].double(),
                layout,
                deleted,
            ),
            "text_mass_of_visual": _mean_over(1 - visual, layout.visual[:, None]),
            "visual_mass_of_text": _mean_over(visual, layout.text[:, None]),
            "sink_mass": _mean_over(first, layout.valid[:, None]),
            "sink_columns": torch.where(is_sink, candidates, -1),
            "sink_column_masses": candidate_mass,
        }

    def layers(self) -> list[LayerFlow]:
        """What was noted, on the host."""
        padding = int(self.layout.valid.shape[-1] - self.layout.lengths[0])
        return [_layer_flow({name: one[0].tolist() for name, one in layer.items()}, padding) for layer in self.masses]


def _layer_flow(numbers: dict[str, Any], padding: int) -> LayerFlow:
    columns, masses = numbers.pop("sink_columns"), numbers.pop("sink_column_masses")
    # Columns of left-padded inputs start after the padding.
    sinks = sorted((column - padding, mass) for column, mass in zip(columns, masses, strict=True) if column >= 0)
    return LayerFlow(
        **numbers, sink_columns=[column for column, _ in sinks], sink_column_masses=[mass for _, mass in sinks]
    )


def _mean_over(rows: Tensor, chosen: Tensor) -> Tensor:
    """Mean of ``[B, N, L]`` over the chosen rows ``[B, 1, L]``; 0 where none is."""
    return torch.where(chosen, rows, 0.0).sum(-1) / chosen.sum(-1).clamp(min=1)


@torch.no_grad()
def record_flow(model: Any, inputs: dict[str, Tensor], *, sampled_rows: int | None = None) -> PromptFlow:
    """Flow of every layer on one prompt, in one forward pass with fused attention.

    Args:
        model: a transformers vision-language model, sdpa or eager.
        inputs: of one prompt, batch size 1; left padding is allowed and ignored.
        sampled_rows: also estimate rho from so many rows of each modality, as a run's online check does.
    """
    ids = inputs["input_ids"]
    valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    layout = PromptLayout.from_masks(visual_mask(model.config, ids), valid)
    sinks = _count_sinks(layout)
    rows = None if sampled_rows is None else RowSample.draw(layout, sampled_rows, ROW_SEED)
    recorder = FlowRecorder(layout, sinks, rows)
    with attached(model, lambda _: recorder):
        model(**inputs, use_cache=False, logits_to_keep=1)
    return PromptFlow(
        tokens=layout.lengths[0],
        visual_tokens=int(layout.visual.sum()),
        images=len(inputs.get("image_grid_thw", ())),
        sinks=sinks,
        uniform_rho=float(uniform_rho(layout)[0]),
        layers=recorder.layers(),
    )


def _count_sinks(layout: PromptLayout) -> int:
    """Text tokens before the first visual one, at most :data:`MAX_SINKS`."""
    first_visual = torch.where(layout.visual.any(), (layout.rank + (~layout.visual) * layout.valid.shape[1]).min(), 0)
    return min(MAX_SINKS, int(first_visual))
