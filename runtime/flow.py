"""Information flow: how much attention mass crosses modalities (eq. 6-7), without an ``L x L`` tensor.

Exact masses come from one fused attention call whose values carry indicator columns; sampled masses from a few rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from flowmm.runtime.prompt import PromptLayout

# Fused kernels want the value width of a multiple of 8; seven columns are free for further classes.
INDICATOR_WIDTH = 8


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
    """Up to `count` rows per batch element drawn without replacement from `candidates` ``[B, L]`` bool.

    Returns index ``[B, R]`` long, ascending, and used ``[B, R]`` bool with ``R = min(count, L)``.
    """
    count = min(count, candidates.shape[-1])
    ticket = torch.rand(candidates.shape, generator=generator).to(candidates.device)
    order = ticket.masked_fill(~candidates, 2.0).argsort(dim=-1)[:, :count]
    order = order.sort(dim=-1).values
    return order, candidates.gather(1, order)


def sampled_rho(
    query: Tensor, key: Tensor, layout: PromptLayout, rows: tuple[tuple[Tensor, Tensor], ...], scaling: float
) -> RhoEstimate:
    """Unbiased rho from sampled rows, stratified by modality: ``(n_V mean_V + n_T mean_T) / L``.

    Args:
        query: ``[B, Hq, L, D]``.
        key: ``[B, Hkv, L, D]``.
        layout: modality and padding.
        rows: (index, used) of the sampled visual rows and of the sampled text rows, see :func:`sample_rows`.
        scaling: softmax scale.

    Returns:
        Estimate over all heads; the standard error includes the finite-population correction, so it is 0 when every
        row was drawn.
    """
    total = layout.valid.sum(-1).float()
    rho, variance = torch.zeros_like(total), torch.zeros_like(total)
    for (index, used), stratum, other in zip(
        rows, (layout.visual, layout.valid & ~layout.visual), (~layout.visual, layout.visual), strict=True
    ):
        crossing = _row_masses(query, key, index, layout.valid, other & layout.valid, scaling)
        size, drawn = stratum.sum(-1).float(), used.sum(-1).float()
        mean = torch.where(used, crossing, 0.0).sum(-1) / drawn.clamp(min=1)
        spread = torch.where(used, (crossing - mean[:, None]).square(), 0.0).sum(-1) / (drawn - 1).clamp(min=1)
        correction = (1 - drawn / size.clamp(min=1)).clamp(min=0)
        rho = rho + size / total * mean
        variance = variance + (size / total).square() * spread * correction / drawn.clamp(min=1)
    return RhoEstimate(rho, variance.sqrt())


def _row_masses(query: Tensor, key: Tensor, index: Tensor, valid: Tensor, columns: Tensor, scaling: float) -> Tensor:
    """``[B, R]`` mass of each row on `columns`, averaged over heads: fused attention on an indicator as its value."""
    batch, q_heads, length, dim = query.shape
    rows = query.gather(2, index[:, None, :, None].expand(batch, q_heads, index.shape[1], dim))
    indicator = pad(columns[:, None, :, None].to(key.dtype), (0, dim - 1)).expand_as(key)
    visible = (torch.arange(length, device=key.device) <= index[..., None]) & valid[:, None]
    grouped = q_heads != key.shape[1]
    output = scaled_dot_product_attention(
        rows, key, indicator, attn_mask=visible[:, None], scale=scaling, enable_gqa=grouped
    )
    return output[..., 0].float().mean(1)
