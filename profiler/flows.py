"""What one forward pass measures of a prompt: numbers on the host, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerFlow:
    """Flow of one layer on one prompt, per query head ``[Hq]`` (fp64 on the host).

    Attributes:
        rho: eq. 6-7, share of the attention mass that crosses modalities.
        rho_nosink: the same without the rows and columns of the prompt's first tokens (:attr:`PromptFlow.sinks`).
        rho_nosink_auto: the same without `sink_columns`.
        text_mass_of_visual: mean mass of visual rows on text columns (0 without visual rows).
        visual_mass_of_text: mean mass of text rows on visual columns (0 without text rows).
        sink_mass: mean mass of all rows on the first tokens.
        sink_columns: at most six columns whose mean mass over rows and heads exceeds 0.1, counted without padding.
        sink_column_masses: that mass, one number per sink column.
        sampled_rho: mean over heads from sampled rows; None unless asked for.
        sampled_error: standard error of `sampled_rho`.
    """

    rho: list[float]
    rho_nosink: list[float]
    rho_nosink_auto: list[float]
    text_mass_of_visual: list[float]
    visual_mass_of_text: list[float]
    sink_mass: list[float]
    sink_columns: list[int]
    sink_column_masses: list[float]
    sampled_rho: float | None = None
    sampled_error: float | None = None


@dataclass(frozen=True)
class PromptFlow:
    """One calibration prompt: its layout and the flow of every layer.

    ``sinks`` counts the text tokens before the first image, at most 4. ``uniform_rho`` is the chance level: rho of
    uniform causal attention over the same layout.
    """

    tokens: int
    visual_tokens: int
    images: int
    sinks: int
    uniform_rho: float
    layers: list[LayerFlow]
