"""Merge operators (eq. 5): each is a rule for the weights of a pivot and of the entries that join it.

An operator never sees how weights are applied; :func:`merge` applies one set of weights to keys and values alike.
Notation in the formulas: pivot j, members i in M, ``n = |M|``, cosine ``u_i``, importance ``m``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import e

import torch
from torch import Tensor

from flowmm.runtime.matching import Assignment
from flowmm.runtime.pivots import entries_at, flat_index

MASS_FLOOR = 1e-12
GAUSS_SIGMA = 5.0


@dataclass(frozen=True)
class Group:
    """What an operator may look at. Pivot tensors end in ``N`` or ``[N, D]``, member tensors in ``E`` or ``[E, D]``.

    Numbers are fp32; `target` is clamped to a valid slot and `joins` says which members count. `members` are their
    places in `all_keys` and `all_values` ``[B, Hkv, L, D]``.
    """

    key: Tensor
    value: Tensor
    mass: Tensor
    member_mass: Tensor
    similarity: Tensor
    target: Tensor
    joins: Tensor
    members: Tensor
    all_keys: Tensor
    all_values: Tensor

    @property
    def member_key(self) -> Tensor:
        """A fresh copy: most operators need none, and keys and values of all members are as large as the layer."""
        return entries_at(self.all_keys, self.members).float()

    @property
    def member_value(self) -> Tensor:
        """A fresh copy."""
        return entries_at(self.all_values, self.members).float()

    def total(self, per_member: Tensor) -> Tensor:
        """Sum of ``[B, Hkv, E]`` over the members of each pivot: ``[B, Hkv, N]``."""
        counted = torch.where(self.joins, per_member, 0.0)
        return torch.zeros_like(self.mass).scatter_add_(2, self.target, counted)

    def of_pivot(self, per_pivot: Tensor) -> Tensor:
        """``[B, Hkv, N]`` seen from each member: ``[B, Hkv, E]``."""
        return per_pivot.gather(2, self.target)

    @property
    def size(self) -> Tensor:
        """``[B, Hkv, N]``: members of each pivot."""
        return self.total(torch.ones_like(self.similarity))


@dataclass(frozen=True)
class Weights:
    """``x'_j = pivot_j x_j + sum_i member_i x_i`` for keys and for values, and a logit bias (``None``: zero)."""

    key_pivot: Tensor
    key_member: Tensor
    value_pivot: Tensor
    value_member: Tensor
    bias: Tensor | None = None


def _shared(pivot: Tensor, member: Tensor, bias: Tensor | None = None) -> Weights:
    return Weights(pivot, member, pivot, member, bias)


def _normalised(group: Group, pivot: Tensor, member: Tensor) -> Weights:
    """Weights divided by their sum over the group."""
    total = pivot + group.total(member)
    return _shared(pivot / total, member / group.of_pivot(total))


def _ones(group: Group) -> tuple[Tensor, Tensor]:
    return torch.ones_like(group.mass), torch.ones_like(group.member_mass)


def evict(group: Group) -> Weights:
    """``k_j, v_j``: nothing is merged."""
    pivot, member = _ones(group)
    return _shared(pivot, 0 * member)


def average(group: Group) -> Weights:
    """``(x_j + sum x_i) / (n + 1)`` (LOOK-M A-merge)."""
    return _normalised(group, *_ones(group))


def pivotal(group: Group) -> Weights:
    """``(x_j + sum (x_i + x_j)/2) / (n + 1)`` (LOOK-M P-merge)."""
    size = group.size
    return _shared((size / 2 + 1) / (size + 1), 0.5 / (group.of_pivot(size) + 1))


def weighted(group: Group) -> Weights:
    """``(x_j + sum u_i x_i) / (n + 1)`` (LOOK-M W-merge); the weights sum to at most 1."""
    size = group.size
    return _shared(1 / (size + 1), group.similarity / (group.of_pivot(size) + 1))


def weighted_norm(group: Group) -> Weights:
    """Weights ``max(u_i, 0)`` against 1 for the pivot, normalised."""
    pivot, _ = _ones(group)
    return _normalised(group, pivot, group.similarity.clamp(min=0))


def factory_weighted(group: Group) -> Weights:
    """Weights ``(u_i + 1) / 2`` against 1 for the pivot, normalised."""
    pivot, _ = _ones(group)
    return _normalised(group, pivot, (group.similarity + 1) / 2)


def d2o(group: Group) -> Weights:
    """Weights ``exp(u_i)`` against ``e`` for the pivot, normalised (D2O)."""
    pivot, _ = _ones(group)
    return _normalised(group, e * pivot, group.similarity.exp())


def gauss(group: Group) -> Weights:
    """Weights ``exp(-||k_j - k_i||^2 / (2 sigma^2))``, sigma 5, normalised (KVMerger)."""
    own = entries_at(group.key, group.target)
    distance = (group.member_key - own).square().sum(-1)
    pivot, _ = _ones(group)
    return _normalised(group, pivot, (-distance / (2 * GAUSS_SIGMA**2)).exp())


def kvpress(group: Group) -> Weights:
    """Keys kept; value weights ``max(u_i, 0) ||v_i|| / (||v_i|| + ||v_j||)`` against 1, normalised."""
    own_norm = group.value.norm(dim=-1)
    norm = group.member_value.norm(dim=-1)
    share = group.similarity.clamp(min=0) * norm / (norm + group.of_pivot(own_norm)).clamp(min=1e-6)
    pivot, member = _ones(group)
    values = _normalised(group, pivot, share)
    return Weights(pivot, 0 * member, values.value_pivot, values.value_member)


def mass(group: Group) -> Weights:
    """``sum m x / sum m`` for keys and values."""
    return _normalised(group, group.mass, group.member_mass)


def keep_mass(group: Group) -> Weights:
    """Keys kept; values ``sum m v / sum m``."""
    pivot, member = _ones(group)
    values = mass(group)
    return Weights(pivot, 0 * member, values.value_pivot, values.value_member)


def keep_mass_bias(group: Group) -> Weights:
    """:func:`keep_mass` with the logit bias ``log(sum m / m_j)``: exact for the proxy when there is one proxy."""
    kept = keep_mass(group)
    return Weights(kept.key_pivot, kept.key_member, kept.value_pivot, kept.value_member, -kept.value_pivot.log())


def count_bias(group: Group) -> Weights:
    """:func:`average` with the logit bias ``log(n + 1)`` (proportional attention)."""
    mean = average(group)
    return _shared(mean.key_pivot, mean.key_member, torch.log1p(group.size))


def tangent(group: Group) -> Weights:
    """:func:`mass` with the entropy of the masses as logit bias.

    Matches value and gradient of the group's log-sum-exp at the proxy query, so it is exact for one proxy and
    first-order right around it.
    """
    merged = mass(group)
    entropy = torch.special.entr(merged.key_pivot) + group.total(torch.special.entr(merged.key_member))
    return _shared(merged.key_pivot, merged.key_member, entropy)


OPERATORS: dict[str, Callable[[Group], Weights]] = {
    operator.__name__: operator
    for operator in (
        evict,
        average,
        pivotal,
        weighted,
        weighted_norm,
        factory_weighted,
        d2o,
        gauss,
        kvpress,
        mass,
        keep_mass,
        keep_mass_bias,
        count_bias,
        tangent,
    )
}

# Operators that read masses; for the others they need not be computed.
MASS_OPERATORS = frozenset({"mass", "keep_mass", "keep_mass_bias", "tangent"})


@dataclass(frozen=True)
class MergedEntries:
    """Compressed entries of one layer: keys and values ``[B, Hkv, N, D]``, bias ``[B, Hkv, N]`` fp32 or ``None``."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None


def gather_group(key: Tensor, value: Tensor, importance: Tensor, assignment: Assignment) -> Group:
    """Pivots and members of one layer in fp32, masses floored at 1e-12."""
    index, evicted = assignment.pivots.index, assignment.evicted
    masses = importance.clamp(min=MASS_FLOOR)
    return Group(
        key=entries_at(key, index).float(),
        value=entries_at(value, index).float(),
        mass=masses.gather(2, index),
        member_mass=masses.gather(2, evicted),
        similarity=assignment.similarity,
        target=assignment.target.clamp(min=0),
        joins=assignment.merged,
        members=evicted,
        all_keys=key,
        all_values=value,
    )


def merge(operator: str, key: Tensor, value: Tensor, importance: Tensor, assignment: Assignment) -> MergedEntries:
    """Merge one layer's evicted entries into their pivots (eq. 5).

    Args:
        operator: a name in :data:`OPERATORS`.
        key, value: ``[B, Hkv, L, D]``.
        importance: ``[B, Hkv, L]`` fp32, the masses of the ``mass`` family.
        assignment: from :func:`flowmm.runtime.matching.assign`.

    Returns:
        Entries in the dtype of `key` and `value`. A pivot that absorbs nothing keeps its values bit for bit.
    """
    index = assignment.pivots.index
    if operator == "evict" or assignment.evicted.shape[2] == 0:
        return MergedEntries(entries_at(key, index), entries_at(value, index), None)
    group = gather_group(key, value, importance, assignment)
    weights = OPERATORS[operator](group)
    absorbed = group.size > 0
    # Keys before values, because the copies that this takes need not lie side by side.
    new_key = _combine(group, group.key, group.member_key, weights.key_pivot, weights.key_member)
    new_key = torch.where(absorbed[..., None], new_key.to(key.dtype), entries_at(key, index))
    new_value = _combine(group, group.value, group.member_value, weights.value_pivot, weights.value_member)
    new_value = torch.where(absorbed[..., None], new_value.to(value.dtype), entries_at(value, index))
    bias = None if weights.bias is None else torch.where(absorbed, weights.bias, 0.0)
    return MergedEntries(new_key, new_value, bias)


def _combine(group: Group, pivot: Tensor, member: Tensor, pivot_weight: Tensor, member_weight: Tensor) -> Tensor:
    """``pivot_weight * pivot + sum over members of member_weight * member``; `member` is overwritten."""
    member *= torch.where(group.joins, member_weight, 0.0)[..., None]
    combined = pivot_weight[..., None] * pivot
    target = flat_index(group.target, pivot.shape[2])
    combined.view(-1, pivot.shape[-1]).index_add_(0, target.flatten(), member.flatten(0, 2))
    return combined
