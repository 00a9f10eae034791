"""Pivot selectors: rules that rank the entries of a layer. Higher is kept first; ties go to the smaller position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from flowmm.plans.method import MethodParameters, parse_selector
from flowmm.runtime.importance import GqaReduce, column_mean
from flowmm.runtime.pivots import as_rows, entries_at, flat_index
from flowmm.runtime.prompt import PromptLayout
from flowmm.runtime.rotary import Rotary
from flowmm.runtime.shared import Shared

# Rounds of a k-center that is not told how many entries to pick at a time: enough to tell near-duplicates apart, few
# enough that a prompt of tens of thousands of tokens waits for none of them. Short prompts can afford more.
LEAST_ROUNDS, MOST_ROUNDS, ROUNDS_TIMES_LENGTH = 16, 64, 2**15
# From so many tokens on, a k-center looks at every second entry, as long as that leaves so many for each it picks. At
# every fourth, the rare entries that it misses cost answers; docs/runtime.md has the numbers.
KCENTER_WHOLE = 4096
ENTRIES_PER_CANDIDATE = 2
CANDIDATES_PER_PICK = 2
# Products of centers and entries are taken in pieces that fit a core's cache, and about as high as wide: a matrix
# product reads its factors again for every piece.
PRODUCTS_AT_A_TIME = 2**18
DEFAULT_WINDOW = 64
# More than any distance in units, and a whole number that fp32 can hold.
MOST_STEPS = 2.0**24


@dataclass(frozen=True)
class LayerView:
    """What a selector may look at.

    Attributes:
        query: ``[B, Hq, L, D]``; key: ``[B, Hkv, L, D]``, both after RoPE.
        rotary: of the prompt; needed by selectors that compare content.
        importance: ``[B, Hkv, L]`` fp32, eq. 8.
        layout: modality and padding.
        forced: ``[B, Hkv, L]`` bool, entries kept in any case; at most `forced_slots` per head.
        free: ``[B]`` long, entries left to choose.
        slots: at least the largest number of entries left to choose in any row, on the host.
        row_slots: the same of each row; empty: not known.
        layer: index, for seeds.
        scaling: softmax scale.
        reduce: query heads to KV head.
        shared: what other compressions of the same layer computed, or will use.
    """

    query: Tensor
    key: Tensor
    rotary: Rotary | None
    importance: Tensor
    layout: PromptLayout
    forced: Tensor
    free: Tensor
    forced_slots: int
    slots: int
    layer: int
    scaling: float
    reduce: GqaReduce
    shared: Shared = field(default_factory=Shared)
    row_slots: tuple[int, ...] = ()

    @property
    def content(self) -> Tensor:
        """``[B, Hkv, L, D]`` fp32 keys with rotation undone."""
        if self.rotary is None:
            raise ValueError("this selector compares unrotated keys and needs the prompt's rotary embedding")
        rotary = self.rotary
        return self.shared.once("content", lambda: rotary.undo(self.key))

    @property
    def open(self) -> Tensor:
        """``[B, Hkv, L]`` bool: valid and not forced."""
        return self.layout.valid[:, None] & ~self.forced


def proxy(view: LayerView, _: float | None) -> Tensor:
    """Attention received from the proxy rows (eq. 8)."""
    return view.importance


def proxy_pool(view: LayerView, kernel: float | None) -> Tensor:
    """:func:`proxy` averaged over `kernel` neighbouring positions (SnapKV)."""
    width = int(kernel or 5) | 1
    return avg_pool1d(view.importance, width, stride=1, padding=width // 2)


def column_mean_score(view: LayerView, rows: float | None) -> Tensor:
    """Mean attention received from the prompt rows that can see the entry; `rows` of them, or all."""
    count = None if rows is None else int(rows)
    return view.shared.once(
        ("column_mean", count, view.reduce),
        lambda: column_mean(view.query, view.key, view.layout, view.scaling, view.reduce, count),
    )


def kcenter(view: LayerView, picks: float | None) -> Tensor:
    """Greedy k-center on content: the entries farthest from everything kept so far, `picks` at a time.

    Without a number, as many at a time as make at most :func:`_rounds` rounds. A long prompt offers
    evenly spaced candidates instead of all entries, see :data:`KCENTER_WHOLE`. Scores are minus the order of the pick;
    an entry that was never picked has -inf.
    """
    return _greedy(view, picks, weighted=False)


def weighted_kcenter(view: LayerView, picks: float | None) -> Tensor:
    """:func:`kcenter` with distances multiplied by the norm of the entry's own key.

    A query that looks for an entry misses it by the more, the farther its nearest kept one is and the longer its key:
    both move the logit.
    """
    return _greedy(view, picks, weighted=True)


def _greedy(view: LayerView, picks: float | None, *, weighted: bool) -> Tensor:
    content, length, strides = view.content, view.key.shape[2], _strides(view)
    candidates, entries, unit, typical = view.shared.once(("distances", strides), lambda: _distances(view, strides))
    batch, rounds, pace = _pace(view, picks)
    batch = min(batch, candidates.shape[2])
    taken = torch.arange(batch, device=entries.device) < pace[:, None, None]
    # Minus infinity: not open, or picked; the slot behind the last entry stands for none.
    open_entries = torch.nn.functional.pad(view.open, (0, 1)).gather(2, candidates)
    distance = torch.where(open_entries, float("inf"), float("-inf"))
    forced, counted = _first_of(view.forced, view.forced_slots)
    _come_nearer(distance, entries, entries_at(content, forced), counted)
    # Never 0, or infinite distances were lost.
    weight = (entries[:, :, -2] / typical).clamp_(min=1e-30) if weighted else None
    rows, heads_inside = as_rows(content)
    places = flat_index(candidates.clamp(max=length - 1), length, heads_inside)
    earlier_first = torch.arange(candidates.shape[2] - 1, -1, -1, device=entries.device)
    order = []
    for turn in range(rounds):
        missed = distance if weight is None else distance * weight
        farthest = _in_steps(missed, unit, earlier_first).topk(batch, dim=-1).indices
        away = distance.gather(2, farthest)
        picked = (away > float("-inf")) & taken
        order.append((farthest, picked))
        if turn < rounds - 1:
            distance.scatter_(2, farthest, away.masked_fill_(picked, float("-inf")))
            centers = rows.index_select(0, places.gather(2, farthest).flatten())
            _come_nearer(distance, entries, centers.view(*farthest.shape, -1), picked)
    farthest, picked = (torch.cat(parts, dim=-1) for parts in zip(*order, strict=True))
    picks_in_order = torch.where(picked, candidates.gather(2, farthest), length)
    ranks = -torch.arange(picks_in_order.shape[-1], device=entries.device, dtype=torch.float32)
    never = torch.full((*distance.shape[:2], length + 1), float("-inf"), device=entries.device)
    return never.scatter(2, picks_in_order, ranks.expand_as(picks_in_order))[..., :-1]


def _pace(view: LayerView, picks: float | None) -> tuple[int, int, Tensor]:
    """Entries picked in a round at most, rounds, and the entries ``[B]`` that each row picks in one of its rounds."""
    if picks:
        batch = int(picks)
        return batch, -(-view.slots // batch), torch.full_like(view.free, batch)
    # Each row of a batch at its own pace, so that its neighbours change nothing.
    rounds = [_rounds(length) for length in view.layout.lengths]
    counts = list(zip(rounds, _row_slots(view), strict=True))
    pace = (view.free / torch.tensor(rounds, device=view.free.device)).ceil().clamp(min=1)
    return max(-(-count // of) for of, count in counts), max(min(of, count) for of, count in counts), pace


def _rounds(length: int) -> int:
    """Rounds for a prompt of so many tokens: entries picked together do not see each other, but a round takes time."""
    return min(max(ROUNDS_TIMES_LENGTH // length, LEAST_ROUNDS), MOST_ROUNDS)


def _row_slots(view: LayerView) -> tuple[int, ...]:
    return view.row_slots or (view.slots,) * len(view.layout.lengths)


def _strides(view: LayerView) -> tuple[int, ...]:
    """How far apart the candidates of each row are."""
    return tuple(
        1
        if length < KCENTER_WHOLE
        else max(1, min(ENTRIES_PER_CANDIDATE, length // max(1, CANDIDATES_PER_PICK * count)))
        for length, count in zip(view.layout.lengths, _row_slots(view), strict=True)
    )


def _first_of(mask: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Positions ``[B, H, slots]`` of the entries in `mask` ``[B, H, L]``, and which of the slots hold one."""
    columns = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    place = torch.where(mask, mask.cumsum(-1) - 1, slots)
    index = columns.new_zeros(*mask.shape[:2], slots + 1).scatter_(2, place, columns)[..., :slots]
    return index, torch.arange(slots, device=mask.device) < mask.sum(-1, keepdim=True)


def _distances(view: LayerView, strides: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Candidates and what their distances are computed from.

    Returns:
        positions ``[B, H, C]`` (L: an empty slot); ``[B, H, D + 2, C]``, see :func:`_with_norms`; the unit of
        distances ``[B, H, 1]``; and about the mean of the squared norms, ``[B, H, 1]``.
    """
    content, layout = view.content, view.layout
    batch, heads, length = content.shape[:3]
    if max(strides) == 1:
        candidates = torch.arange(length, device=content.device).expand(batch, heads, length)
        chosen, valid = content, layout.valid[:, None]
    else:
        apart = torch.tensor(strides, device=content.device)[:, None]
        slots = max(-(-own // stride) for own, stride in zip(layout.lengths, strides, strict=True))
        index, valid = _first_of((layout.valid & (layout.rank % apart == 0))[:, None], slots)
        candidates = torch.where(valid, index, length).expand(batch, heads, slots)
        chosen = entries_at(content, index.expand(batch, heads, slots))
    entries, norms = _with_norms(chosen)
    norms = norms.masked_fill(~valid, 0.0)
    mean = norms.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    # A power of two, as the unit is: the sum's rounding depends on padding.
    return candidates, entries, _distance_unit(norms), torch.exp2(mean.clamp(min=1e-30).log2().round())


def _with_norms(content: Tensor) -> tuple[Tensor, Tensor]:
    """Contents ``[B, H, N, D]``, their squared norms and ones as ``[B, H, D + 2, N]``; the norms, ``[B, H, N]``."""
    batch, heads, count, dim = content.shape
    norms = content.square().sum(-1)
    entries = content.new_ones(batch, heads, dim + 2, count)
    entries[:, :, :dim].copy_(content.transpose(-1, -2))
    entries[:, :, dim].copy_(norms)
    return entries, norms


def _distance_unit(norms: Tensor) -> Tensor:
    """``[B, H, 1]``: about a thousandth of the largest of the squared norms ``[B, H, L]``, a power of two."""
    return torch.exp2(norms.amax(2, keepdim=True).clamp(min=1e-30).log2().ceil()) / 1024


def _in_steps(distance: Tensor, unit: Tensor, earlier_first: Tensor) -> Tensor:
    """Ranks of ``[B, H, C]`` as integers: whole units first, then `earlier_first`, the numbers from C - 1 down to 0.

    Equal tokens have equal content but for rounding, which depends on padding; it must not choose between them.
    """
    steps = (distance / unit).clamp_(min=-1.0, max=MOST_STEPS).floor_().long()
    return steps.mul_(distance.shape[-1]).add_(earlier_first)


def _come_nearer(distance: Tensor, entries: Tensor, centers: Tensor, counted: Tensor) -> None:
    """Lower `distance` ``[B, H, C]`` of `entries` to the nearest of `centers` ``[B, H, n, D]`` that are `counted`.

    Entries as from :func:`_with_norms`.
    """
    norms = centers.square().sum(-1, keepdim=True)
    # (-2c, 1, |c|^2) . (x, |x|^2, 1); the last one stands alone, so a center that does not count is infinitely far.
    norms = norms.masked_fill_(~counted[..., None], float("inf"))
    factors = torch.cat([centers * -2, torch.ones_like(norms), norms], dim=-1)
    of_a_head = max(1, PRODUCTS_AT_A_TIME // (factors.shape[0] * factors.shape[1]))
    for some in factors.split(max(64, isqrt(of_a_head)), 2):
        width = max(256, of_a_head // max(1, some.shape[2]))
        for near, part in zip(distance.split(width, 2), entries.split(width, 3), strict=True):
            torch.minimum(near, (some @ part).amin(2), out=near)


def _squared_distance(left: Tensor, right: Tensor) -> Tensor:
    """``[B, H, M, D]`` and ``[B, H, N, D]`` to ``[B, H, M, N]``."""
    norms = left.square().sum(-1)[..., None] + right.square().sum(-1)[:, :, None]
    return (norms - 2 * left @ right.transpose(-1, -2)).clamp(min=0)


def novelty(view: LayerView, window: float | None) -> Tensor:
    """Distance of an entry's content to the nearest of the `window` entries before it: k-center without the loop."""
    content, reach = view.content, int(window or DEFAULT_WINDOW)
    length = content.shape[2]
    valid = view.layout.valid[:, None]
    scores = []
    for start in range(0, length, reach):
        rows = content[:, :, start : start + reach]
        before = max(0, start - reach)
        columns = content[:, :, before : start + rows.shape[2]]
        row = torch.arange(start, start + rows.shape[2], device=content.device)[:, None]
        column = torch.arange(before, start + rows.shape[2], device=content.device)
        seen = (column < row) & (column >= row - reach) & valid[..., None, before : start + rows.shape[2]]
        scores.append(_squared_distance(rows, columns).masked_fill(~seen, float("inf")).amin(-1))
    return torch.cat(scores, dim=2)


def random(view: LayerView, seed: float | None) -> Tensor:
    """Uniform random scores, keyed by (seed, layer, head, token); independent of padding and batch."""
    heads, length = view.key.shape[1:3]
    generator = torch.Generator().manual_seed(int(seed or 0) * 1_000_003 + view.layer)
    scores = torch.rand(length, heads, generator=generator).T.to(view.key.device)
    rank = view.layout.rank.clamp(min=0)[:, None].expand(-1, heads, -1)
    return scores.expand(len(rank), -1, -1).gather(2, rank)


def uniform(view: LayerView, _: float | None) -> Tensor:
    """Evenly spaced entries among those not forced."""
    place = view.open.long().cumsum(-1)
    total, free = place[..., -1:].clamp(min=1), view.free[:, None, None]
    chosen = (place * free // total) > ((place - 1) * free // total)
    return (chosen & view.open).float()


SELECTORS: dict[str, Callable[[LayerView, float | None], Tensor]] = {
    "proxy": proxy,
    "proxy_pool": proxy_pool,
    "column_mean": column_mean_score,
    "kcenter": kcenter,
    "weighted_kcenter": weighted_kcenter,
    "novelty": novelty,
    "random": random,
    "uniform": uniform,
}


def selection_scores(view: LayerView, method: MethodParameters) -> Tensor:
    """``[B, Hkv, L]`` fp32 scores of the method's selector, with its quotas.

    Two selectors ``a+b``: ``first_share`` of the free entries by ``a``, then the rest by ``b``, which sees a's picks as
    kept.
    """
    parts = parse_selector(method.selector)
    name, number = parts[0]
    scores = SELECTORS[name](view, number)
    if len(parts) == 2:
        scores = _one_after_the_other(view, scores, *parts[1], method.first_share)
    if method.image_quota > 0:
        scores = _guarantee(view, scores, image_ids(view.layout), method.image_quota, proportional=True)
    if method.modality_floor > 0:
        scores = _guarantee(view, scores, view.layout.visual.long(), method.modality_floor, proportional=False)
    return scores


def _ranks(scores: Tensor, among: Tensor) -> Tensor:
    """``[B, Hkv, L]``: 0 for the best entry of `among` (same shape, bool), and so on; ties by position."""
    order = scores.masked_fill(~among, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(2, order, places)


def _one_after_the_other(view: LayerView, first: Tensor, name: str, number: float | None, share: float) -> Tensor:
    count, slots = (view.free * share).long(), int(view.slots * share)
    chosen = (_ranks(first, view.open) < count[:, None, None]) & view.open
    rest = replace(
        view,
        forced=view.forced | chosen,
        forced_slots=view.forced_slots + slots,
        free=view.free - count,
        slots=view.slots - slots,
        row_slots=tuple(count - int(count * share) for count in view.row_slots),
    )
    rank = _ranks(SELECTORS[name](rest, number), rest.open).float()
    return torch.where(chosen, float(first.shape[-1]), -rank)


def image_ids(layout: PromptLayout) -> Tensor:
    """``[B, L]`` long: 0 for text, 1, 2, ... for each run of visual tokens."""
    visual = layout.visual
    starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    return torch.where(visual, starts.long().cumsum(-1), 0)


def _guarantee(view: LayerView, scores: Tensor, group: Tensor, share: float, *, proportional: bool) -> Tensor:
    """Lift the best entries of every group above all others, as many as the group is sure to get.

    Args:
        group: ``[B, L]`` long.
        share: of the free entries (times the group's share of the open ones, if `proportional`).
    """
    overall = _ranks(scores, view.open)
    group = group[:, None].expand_as(overall)
    size = torch.zeros_like(group).scatter_add_(2, group, view.open.long())
    part = size / view.open.sum(-1, keepdim=True).clamp(min=1) if proportional else torch.ones_like(overall)
    sure = (share * view.free[:, None, None] * part).floor().long().gather(2, group)
    by_group = (group * scores.shape[-1] + overall).masked_fill(~view.open, torch.iinfo(torch.long).max)
    order = by_group.sort(dim=-1).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(2, order, places)
    first = (size.cumsum(-1) - size).gather(2, group)
    guaranteed = (rank - first < sure) & view.open
    return torch.where(guaranteed, scores.shape[-1] - overall, -overall).float()
