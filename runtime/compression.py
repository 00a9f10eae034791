"""One layer's compression, start to end: importance, pivots, gated matching, merging. Pure functions on tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowmm.plans import MethodParameters, Mode
from flowmm.plans.method import MASS_RULES, TAU_RULES, parse_rule
from flowmm.runtime.importance import proxy_importance
from flowmm.runtime.matching import Assignment, MatchingRules, assign, named_threshold
from flowmm.runtime.merging import MASS_OPERATORS, MergedEntries, merge
from flowmm.runtime.pivots import Pivots, complement, entries_at, select_pivots
from flowmm.runtime.prompt import PromptLayout, Proxies
from flowmm.runtime.rotary import Rotary
from flowmm.runtime.selection import LayerView, column_mean_score, selection_scores
from flowmm.runtime.shared import Shared

MergeOperation = Callable[..., tuple[MergedEntries, Assignment]]
"""See :class:`flowmm.runtime.compiled.MergeLayer`."""

# Parameters that a stage's outcome does not depend on, beside what decides the mode: `cross` and `counts` say it all.
_DECIDED = frozenset({"preset", "budget", "theta", "rho_kind", "flow"})
_AFTER_MATCHING = frozenset({"merge", "mass"})
_AFTER_SELECTION = frozenset(
    {"gate", "tau", "gate_action", "fallback", "cross_scope", "min_sim", "key_space"} | _AFTER_MATCHING
)
_OF_THE_GATE = frozenset({"tau", "gate_action"})


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

    @cached_property
    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Merged entries, pivots that may not absorb, and the largest number of entries that one pivot absorbed."""
        return self.assignment.merged.sum(), self.assignment.protected.sum(), self.assignment.sizes.max()


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
    return cross & layout.mixed


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
    rotary: Rotary | None = None,
    layer: int = 0,
    shared: Shared | None = None,
    bias: Tensor | None = None,
    operation: MergeOperation | None = None,
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
        rotary: needed when ``method.needs_rotary``.
        layer: index, for random pivots.
        shared: of this layer of this prompt, for all its compressions; they take from each other what they have in
            common. Their tensors must not be changed in place.
        bias: ``[B, Hkv, L]``, finite, logit bias of entries that absorbed others before.
        operation: selects pivots, matches and merges in one go; not together with `shared`.
    """
    # What tells modes apart must be read from the device; a compression on its own need not know.
    modes = () if shared is None else tuple(cross.tolist())
    known = shared or Shared()
    unused = _DECIDED if method.gate else _DECIDED | _OF_THE_GATE

    def compress() -> CompressedLayer:
        importance = known.once(
            ("importance", method.proxies, method.gqa_reduce),
            lambda: proxy_importance(query, key, proxies, layout.valid, scaling, method.gqa_reduce, bias),
        )
        kept = torch.tensor(counts, device=key.device)
        forced = forced_entries(layout, proxies, kept, method)
        view = LayerView(
            query=query,
            key=key,
            rotary=rotary,
            importance=importance,
            layout=layout,
            forced=forced[:, None].expand_as(importance),
            forced_slots=min(max(counts), method.n_sink + proxies.index.shape[1]),
            free=kept - forced.sum(-1),
            slots=max(counts),
            row_slots=counts,
            layer=layer,
            scaling=scaling,
            reduce=method.gqa_reduce,
            shared=known,
        )
        if operation is not None:
            scores = selection_scores(view, method)
            if shared is None:
                _drop_what_selected(known, method)
            entries, assignment = operation(view, scores, value, forced, kept, counts, cross, proxies, method)
            return _completed(view, entries, counts, assignment, method, bias)
        pivots = known.once(
            ("pivots", counts, _parameters(method, _DECIDED | _AFTER_SELECTION)),
            lambda: select_pivots(selection_scores(view, method), forced, layout.valid, kept, max(counts)),
        )
        if shared is None:
            _drop_what_selected(known, method)
        assignment = known.once(
            ("assignment", counts, modes, _parameters(method, unused | _AFTER_MATCHING)),
            lambda: _assign(view, pivots, forced, counts, cross, proxies, method),
        )
        key_states = merged_keys(view, method)
        entries = merge(method.merge, key_states, value, masses_of(view, method), assignment)
        return _completed(view, entries, counts, assignment, method, bias)

    return known.once(("compressed", counts, modes, _parameters(method, unused)), compress)


def _drop_what_selected(known: Shared, method: MethodParameters) -> None:
    """Free what only the selection of pivots needed, each as large as the keys of the layer."""
    known.drop_all("distances", *(("content",) if method.key_space == "post_rope" else ()))


def _parameters(method: MethodParameters, unused: frozenset[str]) -> tuple[Any, ...]:
    """Values of all parameters but the unused."""
    return tuple(value for name, value in method if name not in unused)


def _completed(
    view: LayerView,
    entries: MergedEntries,
    counts: tuple[int, ...],
    assignment: Assignment,
    method: MethodParameters,
    bias_before: Tensor | None,
) -> CompressedLayer:
    """Merged keys in their places, biases of earlier merges carried on, empty slots closed."""
    pivots = assignment.pivots
    if method.key_space == "pre_rope":
        entries = replace(entries, keys=_turned(view, entries.keys, assignment))
    if bias_before is not None:
        carried = _carried_bias(view, bias_before, assignment, method)
        entries = replace(entries, bias=carried if entries.bias is None else entries.bias + carried)
    if min(counts) < max(counts):
        bias = torch.zeros(pivots.index.shape, device=pivots.index.device) if entries.bias is None else entries.bias
        entries = replace(entries, bias=bias.masked_fill(~pivots.filled, float("-inf")))
    return CompressedLayer(entries, assignment, pivots.index)


def _assign(
    view: LayerView,
    pivots: Pivots,
    forced: Tensor,
    counts: tuple[int, ...],
    cross: Tensor,
    proxies: Proxies,
    method: MethodParameters,
) -> Assignment:
    layout = view.layout
    name, number = parse_rule(method.tau if method.gate else "none", TAU_RULES)
    return match(
        compared_keys(view, method),
        view.importance,
        layout.visual,
        layout.valid,
        forced,
        cross,
        proxies.used.sum(-1),
        number or 0.0,
        name,
        leaving_entries(layout, counts),
        pivots,
        method,
    )


def leaving_entries(layout: PromptLayout, counts: tuple[int, ...]) -> int:
    """The largest number of entries that leave any row."""
    return max(length - count for length, count in zip(layout.lengths, counts, strict=True))


def compared_keys(view: LayerView, method: MethodParameters) -> Tensor:
    """``[B, Hkv, L, D]``: keys whose cosines decide who merges with whom."""
    return view.key if method.key_space == "post_rope" else view.content


def match(
    compared: Tensor,
    importance: Tensor,
    visual: Tensor,
    valid: Tensor,
    forced: Tensor,
    cross: Tensor,
    n_proxies: Tensor,
    tau: float | Tensor,
    tau_rule: str,
    leaving: int,
    pivots: Pivots,
    rules: MatchingRules,
) -> Assignment:
    """Gated matching of everything that is not a pivot.

    Args:
        compared: ``[B, Hkv, L, D]`` keys whose cosines count.
        importance: ``[B, Hkv, L]`` fp32.
        visual, valid, forced: ``[B, L]`` bool.
        cross: ``[B]`` bool.
        n_proxies: ``[B]`` proxies of each row.
        tau, tau_rule: see :func:`flowmm.runtime.matching.named_threshold`.
        leaving: the largest number of entries that leave any row.
    """
    can_absorb = pivots.filled & ~forced[:, None].expand_as(importance).gather(2, pivots.index)
    at_pivots = importance.gather(2, pivots.index)
    threshold = named_threshold(tau_rule, tau, at_pivots, can_absorb, valid.sum(-1), n_proxies)
    return assign(
        compared, visual, importance, pivots, complement(pivots, valid, leaving), forced, cross, threshold, rules
    )


def masses_of(view: LayerView, method: MethodParameters) -> Tensor:
    """``[B, Hkv, L]`` masses for the mass operators."""
    name, rows = parse_rule(method.mass, MASS_RULES)
    counted = name == "column_mean" and method.merge in MASS_OPERATORS
    return column_mean_score(view, rows) if counted else view.importance


def merged_keys(view: LayerView, method: MethodParameters) -> Tensor:
    """``[B, Hkv, L, D]``: keys as they are merged, as cached or with rotation undone."""
    return view.content if method.key_space == "pre_rope" else view.key


def _carried_bias(view: LayerView, bias: Tensor, assignment: Assignment, method: MethodParameters) -> Tensor:
    """``[B, Hkv, N]``: biases merged with the weights of the keys, as a logit at the merged key would have them."""
    column = bias[..., None].float()
    return merge(method.merge, column, column, masses_of(view, method), assignment).keys[..., 0]


def _turned(view: LayerView, keys: Tensor, assignment: Assignment) -> Tensor:
    """Keys merged without rotation, each turned to its pivot's position."""
    if view.rotary is None:
        raise ValueError("merging unrotated keys needs the prompt's rotary embedding")
    index = assignment.pivots.index
    turned = view.rotary.redo(keys, index).to(view.key.dtype)
    # Undoing and redoing a rotation rounds; a pivot that absorbed nothing keeps its key bit for bit.
    absorbed = assignment.sizes > 0
    return torch.where(absorbed[..., None], turned, entries_at(view.key, index))
