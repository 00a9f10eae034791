"""A tensor that grows along one dimension inside memory taken in steps, so that appending a token copies a token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Entries reserved whenever memory runs out: a token in 128 pays for a copy of everything, and no more than 128 entries
# ever lie idle.
STEP = 128


class Growing:
    """The first `length` slices of a store along dimension `dim`; what lies behind them is reserve.

    A store taken over from a caller is used as it is until something must be appended to it.
    """

    def __init__(self, tensor: Tensor, dim: int) -> None:
        self._dim = dim
        self._store = tensor
        self.length = tensor.shape[dim]

    @property
    def filled(self) -> Tensor:
        """A view of everything appended so far."""
        return self._store.narrow(self._dim, 0, self.length)

    @property
    def reserved_bytes(self) -> int:
        """Bytes held beyond the filled part."""
        return self._store.nbytes - self.filled.nbytes

    def append(self, new: Tensor) -> Tensor:
        """Add `new` at the end; returns the filled part."""
        return self._extended(new.shape[self._dim], lambda room: room.copy_(new))

    def append_zeros(self, count: int) -> Tensor:
        """Add `count` slices of zeros; returns the filled part."""
        return self._extended(count, Tensor.zero_)

    def _extended(self, count: int, fill: Callable[[Tensor], Tensor]) -> Tensor:
        before, self.length = self.length, self.length + count
        if self.length > self._store.shape[self._dim]:
            shape = list(self._store.shape)
            shape[self._dim] = self.length + STEP
            store = torch.empty(shape, dtype=self._store.dtype, device=self._store.device)
            store.narrow(self._dim, 0, before).copy_(self._store.narrow(self._dim, 0, before))
            self._store = store
        fill(self._store.narrow(self._dim, before, count))
        return self.filled

    def drop_last(self, count: int) -> None:
        """Forget the newest `count` slices."""
        self.length -= count

    def map_rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Replace the store by `pick` of it, which changes rows (dimension 0) alone."""
        self._store = pick(self._store)
