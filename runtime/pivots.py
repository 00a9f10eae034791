"""Pivot selection: which entries of a layer stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pivots:
    """Entries that stay, per KV head, in ascending position.

    Attributes:
        index: ``[B, Hkv, N]`` long; empty slots point at column 0.
        filled: ``[B, 1, N]`` bool; a row with a smaller budget fills fewer slots.
    """

    index: Tensor
    filled: Tensor

    def mask(self, length: int) -> Tensor:
        """``[B, Hkv, L]`` bool, True on kept positions."""
        filled = self.filled.expand_as(self.index)
        mask = torch.zeros(*self.index.shape[:2], length, dtype=torch.bool, device=self.index.device)
        return mask.scatter_reduce(2, self.index, filled, reduce="amax", include_self=True)


def entries_at(states: Tensor, index: Tensor) -> Tensor:
    """``[B, H, L, D]`` at `index` ``[B, H, N]`` long: ``[B, H, N, D]``; copies whole entries, unlike ``gather``."""
    rows, heads_inside = as_rows(states)
    flat = flat_index(index, states.shape[2], heads_inside)
    return rows.index_select(0, flat.flatten()).view(*index.shape, states.shape[3])


def as_rows(states: Tensor) -> tuple[Tensor, int]:
    """``[B, H, L, D]`` as rows of `D`, and the `heads_inside` that :func:`flat_index` needs to find them.

    As hosts lay states out, heads are inside of tokens; bringing them into our order would copy everything.
    """
    if not torch.compiler.is_compiling() and not states.is_contiguous() and states.transpose(1, 2).is_contiguous():
        return states.transpose(1, 2).reshape(-1, states.shape[3]), states.shape[1]
    return states.reshape(-1, states.shape[3]), 0


def flat_index(index: Tensor, length: int, heads_inside: int = 0) -> Tensor:
    """`index` ``[B, H, N]`` into ``[B, H, length, D]`` as an index into the same tensor as ``[B * H * length, D]``.

    With `heads_inside`, into ``[B, length, H, D]`` of so many heads.
    """
    batch, heads = index.shape[:2]
    if heads_inside:
        starts = torch.arange(batch * heads, device=index.device)
        starts = starts % heads_inside + starts // heads_inside * (heads_inside * length)
        return index * heads_inside + starts.view(batch, heads, 1)
    starts = torch.arange(0, batch * heads * length, length, device=index.device)
    return index + starts.view(batch, heads, 1)


def select_pivots(importance: Tensor, forced: Tensor, valid: Tensor, counts: Tensor, slots: int) -> Pivots:
    """Top entries by importance, forced ones first; ties go to the smaller position.

    Args:
        importance: ``[B, Hkv, L]`` fp32.
        forced: ``[B, L]`` bool, kept whatever their importance; at most ``counts[b]`` of them in row b.
        valid: ``[B, L]`` bool.
        counts: ``[B]`` long, entries kept in each row, at most the row's true length.
        slots: ``max(counts)``, on the host.
    """
    length = importance.shape[-1]
    score = importance.masked_fill(forced[:, None], float("inf")).masked_fill(~valid[:, None], float("-inf"))
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :slots]
    filled = torch.arange(slots, device=order.device) < counts[:, None, None]
    index = torch.where(filled, order, length).sort(dim=-1).values
    return Pivots(torch.where(filled, index, 0), filled)


def complement(pivots: Pivots, valid: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Entries that leave, ascending.

    Args:
        valid: ``[B, L]`` bool.
        slots: the largest number of leaving entries of any row, on the host.

    Returns:
        index ``[B, Hkv, E]`` long (unused slots point at column 0) and used ``[B, Hkv, E]`` bool.
    """
    length = valid.shape[-1]
    leaving = valid[:, None] & ~pivots.mask(length)
    columns = torch.arange(length, device=valid.device)
    index = torch.where(leaving, columns, length).sort(dim=-1).values[..., :slots]
    used = index < length
    return torch.where(used, index, 0), used
