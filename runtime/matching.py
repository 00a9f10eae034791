"""Gated matching: each evicted entry finds its most similar pivot that may absorb it (eq. 9-10)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowmm.plans.method import TAU_RULES, parse_rule
from flowmm.runtime.pivots import Pivots, entries_at

NORM_FLOOR = 1e-6
NO_TARGET = -1
# Far below any cosine.
FORBIDDEN = -8.0
# On a CPU, numpy finds maxima about seven times as fast as one thread of torch, but knows no threads.
NUMPY_THREADS = 6
# There, products of entries and pivots are taken in pieces that stay near a core's cache until their maxima are found.
PRODUCTS_AT_A_TIME = 2**19


class MatchingRules(Protocol):
    """What matching takes from :class:`flowmm.plans.MethodParameters`."""

    @property
    def gate(self) -> bool: ...

    @property
    def gate_action(self) -> str: ...

    @property
    def fallback(self) -> str: ...

    @property
    def cross_scope(self) -> str: ...

    @property
    def min_sim(self) -> float | Tensor: ...


@dataclass(frozen=True)
class Assignment:
    """Where every evicted entry goes; decided once, applied to keys, values and masses alike.

    Attributes:
        pivots: the kept entries.
        evicted: ``[B, Hkv, E]`` long, positions of the others.
        used: ``[B, Hkv, E]`` bool, False on filler slots.
        target: ``[B, Hkv, E]`` long, slot of the absorbing pivot in ``[0, N)``, or -1: dropped.
        similarity: ``[B, Hkv, E]`` fp32 cosine to the target, 0 where dropped.
        protected: ``[B, Hkv, N]`` bool, pivots that may not absorb (forced, or importance above tau).
    """

    pivots: Pivots
    evicted: Tensor
    used: Tensor
    target: Tensor
    similarity: Tensor
    protected: Tensor

    @property
    def merged(self) -> Tensor:
        """``[B, Hkv, E]`` bool."""
        return self.target != NO_TARGET

    @property
    def sizes(self) -> Tensor:
        """``[B, Hkv, N]`` long: entries that each pivot absorbs."""
        sizes = torch.zeros_like(self.pivots.index)
        return sizes.scatter_add_(2, self.target.clamp(min=0), self.merged.long())


def tau_threshold(rule: str, importance: Tensor, free: Tensor, lengths: Tensor, n_proxies: Tensor) -> Tensor:
    """:func:`named_threshold` of a rule ``abs:x | mean_mult:c | pivot_quantile:q | mass:mu | none``."""
    name, number = parse_rule(rule, TAU_RULES)
    return named_threshold(name, number or 0.0, importance, free, lengths, n_proxies)


def named_threshold(
    name: str, number: float | Tensor, importance: Tensor, free: Tensor, lengths: Tensor, n_proxies: Tensor
) -> Tensor:
    """Sensitivity threshold per row and KV head; a pivot absorbs only if its importance is at most tau (eq. 10).

    Args:
        name: ``abs | mean_mult | pivot_quantile | mass | none``.
        number: the rule's number; as a tensor, compiled code serves all its values.
        importance: ``[B, Hkv, N]`` of the pivots.
        free: ``[B, Hkv, N]`` bool, pivots that are neither forced nor empty.
        lengths: ``[B]`` prompt lengths.
        n_proxies: ``[B]`` proxies of each row; ``n_proxies / length`` is the exact mean importance.

    Returns:
        ``[B, Hkv, 1]`` fp32.
    """
    shape = (*importance.shape[:2], 1)
    match name:
        case "none":
            return importance.new_full(shape, float("inf"))
        case "abs":
            return importance.new_zeros(shape) + number
        case "mean_mult":
            return (number * n_proxies / lengths).to(importance)[:, None, None].expand(shape)
        case "pivot_quantile":
            return _masked_quantile(importance, free, number)
        case _:
            return _mass_threshold(importance, free, number)


def _masked_quantile(values: Tensor, mask: Tensor, q: float | Tensor) -> Tensor:
    """Linear-interpolated quantile over the masked entries of the last dimension (numpy's default definition)."""
    ordered = values.masked_fill(~mask, float("inf")).sort(dim=-1).values
    rank = q * (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
    low = rank.floor().long()
    high = rank.ceil().long()
    below, above = ordered.gather(-1, low), ordered.gather(-1, high)
    # An all-forced head has no finite value: inf - inf must not become nan.
    return torch.where(low == high, below, below + (above - below) * (rank - low))


def _mass_threshold(values: Tensor, mask: Tensor, share: float | Tensor) -> Tensor:
    """Largest importance outside the smallest top set that holds `share` of the free pivots' importance."""
    ordered = values.masked_fill(~mask, float("-inf")).sort(dim=-1, descending=True).values
    mass = ordered.clamp(min=0).cumsum(-1)
    protected = (mass < share * mass[..., -1:] - 1e-12).sum(-1, keepdim=True) + 1
    padded = torch.cat([ordered, ordered.new_full((*ordered.shape[:2], 1), float("-inf"))], dim=-1)
    return padded.gather(-1, protected.clamp(max=ordered.shape[-1]))


def unit_rows(vectors: Tensor) -> Tensor:
    """Rows scaled to length 1 in fp32, norms clamped at 1e-6."""
    vectors = vectors.float()
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=NORM_FLOOR)


def nearest_pivot(
    evicted_keys: Tensor, pivot_keys: Tensor, admissible: Tensor, evicted_class: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor]:
    """Most similar admissible pivot of every evicted entry, in blocks: no evicted x kept matrix is ever made.

    Args:
        evicted_keys: ``[B, Hkv, E, D]`` unit rows.
        pivot_keys: ``[B, Hkv, N, D]`` unit rows.
        admissible: ``[B, Hkv, 2, N]`` bool: which pivots an entry of class 0 (text) or 1 (visual) may join.
        evicted_class: ``[B, Hkv, E]`` long, 0 or 1.
        allowed: ``[B, Hkv, E]`` bool, entries to match at all.

    Returns:
        target ``[B, Hkv, E]`` long (-1: none) and similarity ``[B, Hkv, E]`` fp32 (-inf: none). The smaller slot wins
        ties.
    """
    given = (evicted_keys, pivot_keys, admissible, evicted_class, allowed)
    return (_nearest_in_groups if _readable(admissible) else _nearest_of_all)(*given)


def _readable(tensor: Tensor) -> bool:
    """Whether reading content waits for no device, and no compiler: a plain tensor in the host's own memory."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _nearest_in_groups(
    evicted_keys: Tensor, pivot_keys: Tensor, admissible: Tensor, evicted_class: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`nearest_pivot`, each group of entries against the pivots that it may join and no others.

    A group is a modality of one head of one row, or all of a head's entries where both may join the same pivots.
    """
    target = torch.full_like(evicted_class, NO_TARGET)
    similarity = torch.full(target.shape, float("-inf"), dtype=evicted_keys.dtype)
    for row, head in itertools.product(*map(range, evicted_keys.shape[:2])):
        here = row, head
        text, visual = admissible[here]
        groups = [(allowed[here], text)]
        if not torch.equal(text, visual):
            of_text = evicted_class[here] == 0
            groups = [(allowed[here] & of_text, text), (allowed[here] & ~of_text, visual)]
        for members, joinable in groups:
            entries, slots = members.nonzero()[:, 0], joinable.nonzero()[:, 0]
            if len(entries) == 0 or len(slots) == 0:
                continue
            pivots = pivot_keys[here].index_select(0, slots).T
            for block in entries.split(max(64, PRODUCTS_AT_A_TIME // len(slots))):
                values, places = _best_in_rows(evicted_keys[here].index_select(0, block) @ pivots)
                target[here].index_copy_(0, block, slots.index_select(0, places))
                similarity[here].index_copy_(0, block, values)
    return target, similarity


def _nearest_of_all(
    evicted_keys: Tensor, pivot_keys: Tensor, admissible: Tensor, evicted_class: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`nearest_pivot` with shapes that no content decides, for devices and for compiled code."""
    # Two further columns carry the modality rule, so that it costs no pass over the products: an entry has a 1 in its
    # class's column, a pivot that class may not join has a penalty there that no cosine makes up for.
    penalty = torch.where(admissible, 0.0, FORBIDDEN).to(pivot_keys.dtype)
    pivots = torch.cat([pivot_keys.transpose(-1, -2), penalty], dim=2)
    length, dim = evicted_keys.shape[2:]
    count = _blocks(length, pivot_keys.shape[2], pivot_keys.shape[3])
    # Always more than needed: where sizes could meet, compiled code would be made once for each case.
    size = length // count + 1
    entries = torch.nn.functional.pad(evicted_keys, (0, 2, 0, count * size - length))
    entries[:, :, :length, dim].copy_(evicted_class == 0)
    entries[:, :, :length, dim + 1].copy_(evicted_class == 1)
    # Heads in one dimension: a compiler takes products of matrices in more of them apart, block by block.
    heads = evicted_keys.shape[:2]
    blocks = entries.flatten(0, 1).unflatten(1, (count, size)).unbind(1)
    flat = pivots.flatten(0, 1)
    best = [_best_in_rows(torch.bmm(block, flat)) for block in blocks]
    similarity = torch.cat([values for values, _ in best], 1)[:, :length].unflatten(0, heads)
    target = torch.cat([indices for _, indices in best], 1)[:, :length].unflatten(0, heads)
    found = allowed & (similarity > FORBIDDEN / 2)
    return torch.where(found, target, NO_TARGET), similarity.masked_fill(~found, float("-inf"))


def _best_in_rows(products: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of each row (last dimension) and its first place."""
    if not _readable(products) or torch.get_num_threads() > NUMPY_THREADS:
        return products.max(dim=-1)
    # torch looks for the place of a maximum one number at a time, numpy many at a time.
    place = torch.from_numpy(products.detach().numpy().argmax(-1))[..., None]
    return products.gather(-1, place)[..., 0], place[..., 0]


def _blocks(evicted: int, kept: int, dim: int) -> int:
    """Blocks of entries, so many that the products of one take no more memory than keys and values of all entries.

    A power of 4 times 16: compiled code is made for a number of blocks, and serves prompts of many lengths.
    """
    count = 16
    while evicted * kept > count * 2 * dim * (evicted + kept):
        count *= 4
    return count


def assign(
    key: Tensor,
    visual: Tensor,
    importance: Tensor,
    pivots: Pivots,
    evicted: tuple[Tensor, Tensor],
    forced: Tensor,
    cross: Tensor,
    tau: Tensor,
    method: MatchingRules,
) -> Assignment:
    """Gated matching of one layer (eq. 9-10).

    Args:
        key: ``[B, Hkv, L, D]``.
        visual: ``[B, L]`` bool.
        importance: ``[B, Hkv, L]`` fp32.
        pivots: entries that stay.
        evicted: index ``[B, Hkv, E]`` and used ``[B, Hkv, E]``, see :func:`flowmm.runtime.pivots.complement`.
        forced: ``[B, L]`` bool; a forced entry never absorbs.
        cross: ``[B]`` bool, cross-modal merging in this layer.
        tau: ``[B, Hkv, 1]`` sensitivity threshold; ignored when ``method.gate`` is off.
        method: gate action, fallback, cross scope and similarity floor.
    """
    index, used = evicted
    heads = key.shape[1]
    visual = visual[:, None].expand(-1, heads, -1)
    can_absorb = pivots.filled & ~forced[:, None].expand_as(visual).gather(2, pivots.index)
    sensitive = (importance.gather(2, pivots.index) > tau) if method.gate else torch.zeros_like(can_absorb)
    pivot_visual, evicted_class = visual.gather(2, pivots.index), visual.gather(2, index).long()
    by_class = _modality_rule(pivot_visual, cross, method)
    unit_pivots, unit_evicted = unit_rows(entries_at(key, pivots.index)), unit_rows(entries_at(key, index))

    def nearest(absorbers: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        return nearest_pivot(unit_evicted, unit_pivots, absorbers[:, :, None] & classes, evicted_class, used)

    open_pivots = can_absorb & ~sensitive
    if method.gate and method.gate_action == "drop":
        target, similarity = nearest(can_absorb, by_class)
        blocked = sensitive.gather(2, target.clamp(min=0))
        target = target.masked_fill(blocked, NO_TARGET)
    else:
        target, similarity = nearest(open_pivots, by_class)
        if method.fallback != "drop":
            relaxed = (
                (can_absorb, by_class) if method.fallback == "relax_tau" else (open_pivots, torch.ones_like(by_class))
            )
            second, second_similarity = nearest(*relaxed)
            missing = target == NO_TARGET
            target = torch.where(missing, second, target)
            similarity = torch.where(missing, second_similarity, similarity)
    target = target.masked_fill(similarity < method.min_sim, NO_TARGET)
    return Assignment(
        pivots, index, used, target, similarity.masked_fill(target == NO_TARGET, 0.0), pivots.filled & ~open_pivots
    )


def _modality_rule(pivot_visual: Tensor, cross: Tensor, method: MatchingRules) -> Tensor:
    """``[B, Hkv, 2, N]`` bool: may a text (0) or visual (1) entry join this pivot, by the layer's mode."""
    same = torch.stack([~pivot_visual, pivot_visual], dim=2)
    when_cross = torch.ones_like(same) if method.cross_scope == "any" else ~same
    return torch.where(cross[:, None, None, None], when_cross, same)
