"""One layer's compression, start to end: importance, pivots, gated matching, merging. Pure functions on tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmm.plans import MethodParameters, Mode
from flowmm.runtime.importance import proxy_importance
from flowmm.runtime.matching import Assignment, assign, tau_threshold
from flowmm.runtime.merging import MergedEntries, merge
from flowmm.runtime.pivots import complement, select_pivots
from flowmm.runtime.prompt import PromptLayout, Proxies


@dataclass(frozen=True)
class CompressedLayer:
    """Entries that stay, how they were chosen, and where each comes from.

    Attributes:
        entries: keys, values and logit bias; empty slots of shorter rows hold -inf in the bias.
        assignment: pivots, evicted entries and their targets.
        positions: ``[B, Hkv, N]`` long, column of every entry in the prompt (empty slots: 0).
    """

    entries: MergedEntries
    assignment: Assignment
    positions: Tensor


def cross_rows(mode: Mode, rho: Tensor | None, layout: PromptLayout, method: MethodParameters) -> Tensor:
    """``[B]`` bool: cross-modal merging in this layer (eq. 7: strictly ``rho > theta``).

    A row with one modality is intra (nothing crosses), whatever the plan says.
    """
    device = layout.valid.device
    if mode == "online":
        if rho is None:
            raise ValueError("an online layer needs a measured rho")
        cross = rho > method.theta
    else:
        cross = torch.full((len(layout.lengths),), mode == "cross", device=device)
    match method.flow:
        case "off:any":
            cross = torch.ones_like(cross)
        case "off:intra":
            cross = torch.zeros_like(cross)
        case "inverted":
            cross = ~cross
    both = layout.visual.any(-1) & (layout.valid & ~layout.visual).any(-1)
    return cross & both


def forced_entries(layout: PromptLayout, proxies: Proxies, counts: Tensor, method: MethodParameters) -> Tensor:
    """``[B, L]`` bool: sinks and proxies that stay inside the budget.

    When the budget is small they yield, not the budget: proxies take at most half of it, sinks leave one free entry.
    """
    length = layout.valid.shape[-1]
    forced = torch.zeros_like(layout.valid)
    kept_proxies = torch.zeros_like(counts)
    if method.keep_proxies:
        mask = proxies.mask(length)
        from_the_end = mask.flip(-1).cumsum(-1).flip(-1)
        half = (counts // 2).clamp(min=1)[:, None]
        forced = mask & (from_the_end <= half)
        kept_proxies = forced.sum(-1)
    sinks = (counts - kept_proxies - 1).clamp(min=0, max=method.n_sink)
    return forced | (layout.valid & (layout.rank < sinks[:, None]))


def compress_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PromptLayout,
    proxies: Proxies,
    counts: tuple[int, ...],
    cross: Tensor,
    method: MethodParameters,
    scaling: float,
) -> CompressedLayer:
    """Compress the prompt's entries of one layer (eq. 5 and 8-10).

    Args:
        query: ``[B, Hq, L, D]`` after RoPE.
        key, value: ``[B, Hkv, L, D]``, keys after RoPE.
        layout: modality, padding, lengths.
        proxies: rows that give importance.
        counts: entries kept in each row, 1 <= count <= length.
        cross: ``[B]`` bool, see :func:`cross_rows`.
        method: all options.
        scaling: softmax scale.
    """
    device = key.device
    kept = torch.tensor(counts, device=device)
    importance = proxy_importance(query, key, proxies, layout.valid, scaling, method.gqa_reduce)
    forced = forced_entries(layout, proxies, kept, method)
    pivots = select_pivots(importance, forced, layout.valid, kept, max(counts))
    leaving = max(length - count for length, count in zip(layout.lengths, counts, strict=True))
    evicted = complement(pivots, layout.valid, leaving)
    at_pivots = importance.gather(2, pivots.index)
    free = pivots.filled & ~forced[:, None].expand_as(importance).gather(2, pivots.index)
    lengths, used_proxies = layout.valid.sum(-1), proxies.used.sum(-1)
    tau = tau_threshold(method.tau, at_pivots, free, lengths, used_proxies)
    assignment = assign(key, layout.visual, importance, pivots, evicted, forced, cross, tau, method)
    entries = merge(method.merge, key, value, importance, assignment)
    if min(counts) < max(counts):
        bias = torch.zeros(pivots.index.shape, device=device) if entries.bias is None else entries.bias
        entries = MergedEntries(entries.keys, entries.values, bias.masked_fill(~pivots.filled, float("-inf")))
    return CompressedLayer(entries, assignment, pivots.index)
