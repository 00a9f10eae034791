"""Attention sinks: columns that draw more than a tenth of all attention, found without an ``L x L`` tensor.

A few rows, sampled before the pass, name the candidates; the pass itself then measures their exact mass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowmm.runtime.importance import rows_attention
from flowmm.runtime.prompt import PromptLayout

# A column is a sink when its mean mass over all rows and heads exceeds this (G12, ``auto``).
SINK_MASS = 0.1
SAMPLED_ROWS = 32
# The sampled mass of a sink falls below half of the true one only where very few rows attend to it.
CANDIDATE_MASS = SINK_MASS / 2


def sink_candidates(query: Tensor, key: Tensor, layout: PromptLayout, scaling: float, count: int) -> Tensor:
    """The `count` columns with the largest mass on evenly spaced rows.

    Args:
        query: ``[1, Hq, L, D]``.
        key: ``[1, Hkv, L, D]``.
        layout: of one prompt.
        scaling: softmax scale.
        count: how many at most.

    Returns:
        ``[1, C]`` long with ``C = min(count, L)``; -1 where the sampled mean mass is below half a sink's.
    """
    length, own = layout.valid.shape[-1], layout.lengths[0]
    # Middles of equal stretches, so that no stretch of the prompt is counted more than another.
    ranks = ((torch.arange(min(SAMPLED_ROWS, own)) + 0.5) * own / min(SAMPLED_ROWS, own)).long()
    rows = layout.valid[0].nonzero()[:, 0][ranks.to(layout.valid.device)]
    attention = rows_attention(query, key, rows[None], layout.valid, scaling)
    mean = attention.mean((1, 2, 3))
    mass, columns = mean.topk(min(count, length), dim=-1)
    return torch.where(mass > CANDIDATE_MASS, columns, -1)


def columns_as_classes(columns: Tensor, length: int) -> Tensor:
    """``[1, L, C]`` bool: a class per column of ``[1, C]``; an empty one for -1."""
    return torch.arange(length, device=columns.device)[None, :, None] == columns[:, None]
