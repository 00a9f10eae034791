"""Information flow: how much attention mass crosses modalities (eq. 6-7), without an ``L x L`` tensor.

Exact masses come from one fused attention call whose values carry indicator columns; sampled masses from a few rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from flowmm.runtime.importance import LOGITS_AT_A_TIME, rows_attention
from flowmm.runtime.prompt import PromptLayout

# Fused kernels want the value width of a multiple of 8; seven columns are free for further classes.
INDICATOR_WIDTH = 8
# On a device, logits of sampled rows are taken together until starting its kernels is worth it.
LOGITS_ON_DEVICE = 2**24
# A row is drawn at one of so many places in its stretch: integers, so that every device draws the same.
PLACES = 2**20


def attention_with_class_mass(
    query: Tensor, key: Tensor, value: Tensor, classes: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Causal attention output and, from the same call, each row's exact mass on each class of columns.

    Args:
        query: ``[B, Hq, L, D]``.
        key, value: ``[B, Hkv, L, D]``.
        classes: ``[B, L, C]`` bool with ``C <= 8``; a column may be in several classes or in none.
        mask: ``[B, 1, L, L]`` as the host library built it, or ``None`` for a plain causal mask.
        scaling: softmax scale.

    Returns:
        output ``[B, Hq, L, D]`` and masses ``[B, Hq, L, C]`` fp32. A fully masked row (padding) has mass 0.
    """
    dim, kinds = value.shape[-1], classes.shape[-1]
    indicators = pad(classes.to(value.dtype), (0, INDICATOR_WIDTH - kinds))
    indicators = indicators[:, None].expand(*value.shape[:3], INDICATOR_WIDTH)
    wide = (0, INDICATOR_WIDTH)
    output = scaled_dot_product_attention(
        pad(query, wide),
        pad(key, wide),
        torch.cat([value, indicators], dim=-1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    masses = output[..., dim : dim + kinds].float()
    return output[..., :dim], torch.where(masses.isfinite(), masses, 0.0)


@dataclass(frozen=True)
class RhoEstimate:
    """Flow of one layer. `rho` and `standard_error` are ``[B]`` fp32; exact estimates have standard error 0."""

    rho: Tensor
    standard_error: Tensor


def rho_per_head(visual_mass: Tensor, layout: PromptLayout) -> Tensor:
    """Eq. 6-7 per query head: mass that crosses modalities over the number of rows.

    Args:
        visual_mass: ``[B, Hq, L]``, each row's mass on visual columns.
        layout: modality and padding.

    Returns:
        ``[B, Hq]`` in the dtype of `visual_mass`. Because every causal row sums to 1, the head's total attention in
        eq. 6 is the number of valid rows.
    """
    return rho_without_sinks(visual_mass, torch.zeros_like(visual_mass), layout, 0)


def rho_without_sinks(visual_mass: Tensor, sink_mass: Tensor, layout: PromptLayout, n_sinks: int) -> Tensor:
    """:func:`rho_without` the first `n_sinks` tokens of each row, which must be text.

    Args:
        visual_mass: ``[B, Hq, L]``, mass on visual columns.
        sink_mass: ``[B, Hq, L]``, mass on the first `n_sinks` columns.
        layout: modality and padding.
        n_sinks: deleted tokens of each row.
    """
    return rho_without(visual_mass, sink_mass, layout, layout.rank < n_sinks)


def rho_without(visual_mass: Tensor, deleted_mass: Tensor, layout: PromptLayout, deleted: Tensor) -> Tensor:
    """:func:`rho_per_head` after deleting rows and columns and renormalising the other rows (G12).

    Args:
        visual_mass: ``[B, Hq, L]``, mass on the visual columns that stay.
        deleted_mass: ``[B, Hq, L]``, mass on the deleted columns.
        layout: modality and padding.
        deleted: ``[B, L]`` bool.

    Returns:
        ``[B, Hq]``; 0 where no row stays.
    """
    left = 1 - deleted_mass
    # Anything a row has left below rounding error is noise, not flow.
    crossing = torch.where(layout.visual[:, None], left - visual_mass, visual_mass) / left.clamp(min=1e-6)
    rows = (layout.valid & ~deleted)[:, None]
    return torch.where(rows & (left > 1e-6), crossing, 0.0).sum(-1) / rows.sum(-1).clamp(min=1)


def uniform_rho(layout: PromptLayout) -> Tensor:
    """``[B]`` fp64: rho of uniform causal attention over the same layout, in O(L); the chance level of ``lift``."""
    visual, valid = layout.visual.double(), layout.valid.double()
    seen = valid.cumsum(-1).clamp(min=1)
    share = visual.cumsum(-1) / seen
    crossing = torch.where(layout.visual, 1 - share, share) * valid
    return crossing.sum(-1) / valid.sum(-1)


def sample_rows(candidates: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random row from each of `count` equal stretches of the candidates ``[B, L]`` bool, or all if they are fewer.

    Attention of a row depends on where it is, so that rows from everywhere say more than as many from anywhere. Each
    candidate is as likely as any other, and the draw does not depend on padding.

    Returns index ``[B, R]`` long, ascending, and used ``[B, R]`` bool, the first ones, with ``R = min(count, L)``.
    """
    count = min(count, candidates.shape[-1])
    ranks = candidates.cumsum(-1)
    own = ranks[:, -1:]
    drawn, turn = own.clamp(max=count), torch.arange(count, device=own.device)
    place = turn * PLACES + torch.randint(PLACES, (count,), generator=generator).to(own.device)
    rank = (place * own).div(drawn.clamp(min=1) * PLACES, rounding_mode="floor")
    index = torch.searchsorted(ranks, rank + 1).clamp(max=candidates.shape[-1] - 1)
    return index, turn < drawn


@dataclass(frozen=True)
class RowSample:
    """Rows that rho is estimated from, stratified by modality, and what each of them counts; the same in every layer.

    Attributes:
        index: ``[B, R]`` long, sampled visual rows and behind them sampled text rows.
        used: ``[B, R]`` bool.
        start: ``[B]`` fp32, share of visual rows: rho if no row had any mass on visual columns.
        weights: ``[B, R]`` fp32, what a row's mass on visual columns adds to rho; negative for visual rows.
        steps: ``[B, R - 1]`` fp32, what a squared difference of neighbours adds to the variance.
    """

    index: Tensor
    used: Tensor
    start: Tensor
    weights: Tensor
    steps: Tensor

    @classmethod
    def draw(cls, layout: PromptLayout, count: int, seed: int) -> Self:
        """`count` rows of each modality, see :func:`sample_rows`."""
        generator = torch.Generator().manual_seed(seed)
        strata = layout.visual, layout.text
        return cls.of(layout, *(sample_rows(stratum, count, generator) for stratum in strata))

    @classmethod
    def of(cls, layout: PromptLayout, visual: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor]) -> Self:
        """Of (index, used) of visual and of text rows, each ascending and used ones first."""
        total = layout.valid.sum(-1, keepdim=True).float()
        weights, steps = [], []
        for (_, used), stratum in ((visual, layout.visual), (text, layout.text)):
            size, drawn = stratum.sum(-1, keepdim=True), used.sum(-1, keepdim=True)
            share = size / total
            unseen = (1 - drawn / size.clamp(min=1)).clamp(min=0)
            step = share.square() * unseen / (2 * drawn * (drawn - 1)).clamp(min=1)
            weights.append(torch.where(used, share / drawn.clamp(min=1), 0.0))
            # Nothing between the last row of one modality and the first of the other.
            steps.append(pad(torch.where(used[:, 1:], step, 0.0), (0, 1)))
        return cls(
            index=torch.cat([visual[0], text[0]], dim=-1),
            used=torch.cat([visual[1], text[1]], dim=-1),
            start=(layout.visual.sum(-1, keepdim=True) / total)[:, 0],
            weights=torch.cat([-weights[0], weights[1]], dim=-1),
            steps=torch.cat(steps, dim=-1)[:, :-1],
        )


def sampled_rho(query: Tensor, key: Tensor, layout: PromptLayout, rows: RowSample, scaling: float) -> RhoEstimate:
    """Unbiased rho from sampled rows, stratified by modality: ``(n_V mean_V + n_T mean_T) / L``.

    Args:
        query: ``[B, Hq, L, D]``.
        key: ``[B, Hkv, L, D]``.
        layout: modality and padding.
        rows: the sample.
        scaling: softmax scale.

    Returns:
        Estimate over all heads. The standard error is that of neighbours' differences, rather too large than too small
        where rho drifts along the prompt; with the finite-population correction it is 0 when every row was drawn.
    """
    masses = torch.where(rows.used, _visual_masses(query, key, rows.index, layout, scaling), 0.0)
    variance = (masses.diff(dim=-1).square() * rows.steps).sum(-1)
    return RhoEstimate(rows.start + (masses * rows.weights).sum(-1), variance.sqrt())


def _visual_masses(query: Tensor, key: Tensor, index: Tensor, layout: PromptLayout, scaling: float) -> Tensor:
    """``[B, R]`` mass of each row on visual columns, averaged over heads; rows of padding have none (NaN)."""
    index, order = index.sort(dim=-1)
    on_host = key.device.type == "cpu"
    together = max(8, (LOGITS_AT_A_TIME if on_host else LOGITS_ON_DEVICE) // query[..., 0].numel())
    visual = layout.visual.to(torch.float32)[:, None, None, :, None]
    masses = []
    for rows in index.split(together, dim=-1):
        # No row sees a column behind the last of them. Elsewhere than on the host, asking which that is means waiting.
        width = int(rows.max()) + 1 if on_host else key.shape[2]
        attention = rows_attention(query, key[:, :, :width], rows, layout.valid[:, :width], scaling)
        masses.append((attention @ visual[:, :, :, :width]).squeeze(-1).mean((1, 2)))
    return torch.cat(masses, dim=-1).gather(1, order.argsort(dim=-1))
