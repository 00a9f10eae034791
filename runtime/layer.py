"""One layer of the compressed KV cache: merged prompt entries, then every token that came after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from flowmm.errors import FlowmmError
from flowmm.runtime.compression import CompressedLayer
from flowmm.runtime.growing import Growing

ENTRIES = 2
"""Dimension of keys, values, bias and positions that counts entries."""


class FlowLayer(DynamicLayer):
    """Keys and values ``[B, Hkv, n, D]`` of one layer and an additive logit bias ``[B, Hkv, n]`` (or ``None``).

    ``seen`` counts true tokens, the tensors hold fewer; masks and positions of the host library follow ``seen``.
    The bias has the dtype of the keys, because that is what attention adds it in; empty slots of a batch's shorter rows
    hold -inf. ``positions`` ``[B, Hkv, N]`` are the columns of the compressed entries in the conversation, and
    ``prompt_length`` counts the tokens that they stand for. ``recent`` ``[B, Hq, P, D]`` are queries of the latest
    tokens, where they are remembered. ``row_entries`` are the entries of each row after it was compressed again.
    """

    def __init__(self) -> None:
        self._keys: Growing | None = None
        self._values: Growing | None = None
        self._bias: Growing | None = None
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.seen = 0
        self.prompt_length = 0
        self.bias = None
        self.positions: Tensor | None = None
        self.recent: Tensor | None = None
        self.row_entries: tuple[int, ...] | None = None

    @property
    def keys(self) -> Tensor | None:
        """A view of the entries held."""
        return None if self._keys is None else self._keys.filled

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys = None if keys is None else Growing(keys, ENTRIES)

    @property
    def values(self) -> Tensor | None:
        """A view of the entries held."""
        return None if self._values is None else self._values.filled

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values = None if values is None else Growing(values, ENTRIES)

    @property
    def bias(self) -> Tensor | None:
        """A view of the biases held, ``None`` where all are 0."""
        return None if self._bias is None else self._bias.filled

    @bias.setter
    def bias(self, bias: Tensor | None) -> None:
        self._bias = None if bias is None else Growing(bias, ENTRIES)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[-2]
        return self._append(key_states, value_states)

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            self.lazy_initialization(keys, values)
            self.keys, self.values = _own(keys), _own(values)
            return keys, values
        if self._bias is not None:
            self._bias.append_zeros(keys.shape[-2])
        return self._keys.append(keys), self._values.append(values)

    def hold(self, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        """Hold these entries and no others."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.bias = None if bias is None else bias.to(keys.dtype)

    def first_entries(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` entries.

        Raises:
            FlowmmError: the layer has seen no prompt.
        """
        keys, values = self.keys, self.values
        if keys is None or values is None:
            raise FlowmmError("a layer that has seen no prompt has no entries")
        return keys[:, :, :length], values[:, :, :length]

    def replace_prompt(self, compressed: CompressedLayer, length: int) -> None:
        """Swap the full entries of a prompt of `length` tokens for its compressed ones; newer entries stay."""
        keys, values = self.first_entries(self.kept)
        entries = compressed.entries
        self.hold(entries.keys, entries.values, entries.bias)
        self.positions, self.prompt_length = compressed.positions, length
        if keys.shape[ENTRIES] > length:
            self._append(keys[:, :, length:], values[:, :, length:])

    def replace_all(self, entries: tuple[Tensor, Tensor, Tensor | None], positions: Tensor) -> None:
        """Swap everything held for fewer entries (keys, values, bias) at `positions`."""
        self.hold(*entries)
        self.positions, self.prompt_length, self.recent = positions, self.seen, None

    def all_positions(self) -> Tensor:
        """``[B, Hkv, n]`` long: column of every entry held in the conversation (empty slots: any)."""
        keys, _ = self.first_entries(self.kept)
        batch, heads, held = keys.shape[:3]
        merged = 0 if self.positions is None else self.positions.shape[ENTRIES]
        later = torch.arange(self.seen - held + merged, self.seen, device=keys.device).expand(batch, heads, -1)
        return later if self.positions is None else torch.cat([self.positions, later], dim=ENTRIES)

    def remember_queries(self, query: Tensor, count: int) -> None:
        """Keep the latest `count` of the queries seen since the last compression, those in `query` included."""
        latest = query if self.recent is None else torch.cat([self.recent, query], dim=ENTRIES)
        self.recent = latest[:, :, -count:]

    def replace_by_rows(self, layers: Sequence[FlowLayer]) -> None:
        """Hold the rows of several layers that saw equally many tokens; the shorter get empty slots at their end."""
        width = max(layer.kept for layer in layers)
        keys, values, biases = zip(*(layer._widened(width) for layer in layers), strict=True)
        biased = any(layer.bias is not None or layer.kept < width for layer in layers)
        self.hold(torch.cat(keys), torch.cat(values), torch.cat(biases) if biased else None)
        self.seen, self.prompt_length = layers[0].seen, layers[0].prompt_length

    def _widened(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and bias with empty slots up to `width`."""
        keys, values = self.first_entries(self.kept)
        bias = keys.new_zeros(keys.shape[:3]) if self.bias is None else self.bias
        gap = width - keys.shape[-2]
        return pad(keys, (0, 0, 0, gap)), pad(values, (0, 0, 0, gap)), pad(bias, (0, gap), value=float("-inf"))

    @property
    def kept(self) -> int:
        """Entries held per KV head, generated tokens included."""
        return 0 if self._keys is None else self._keys.length

    @property
    def nbytes(self) -> int:
        """Bytes of the entries held: keys, values and bias."""
        held = (self.keys, self.values, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    @property
    def bytes_per_entry(self) -> int:
        """Bytes that one entry of every row and KV head takes."""
        return self.nbytes // max(self.kept, 1)

    @property
    def reserved_bytes(self) -> int:
        """Bytes taken beyond :attr:`nbytes` for tokens to come."""
        held = (self._keys, self._values, self._bias)
        return sum(growing.reserved_bytes for growing in held if growing is not None)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kept + query_length, self.seen - self.kept

    def reset(self) -> None:
        # Not every supported transformers version drops the tensors of a growing layer; some only zero them.
        self.keys = self.values = None
        self.is_initialized = False
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``abs(tokens_to_remove)`` tokens.

        Raises:
            FlowmmError: that many were not appended since the prompt was merged.
        """
        removed = abs(int(tokens_to_remove))
        if removed > self.seen - self.prompt_length and self.positions is not None:
            raise FlowmmError(
                f"cannot remove {removed} tokens: only {self.seen - self.prompt_length} were appended after the "
                "prompt was merged, and merged entries cannot be taken apart"
            )
        self.seen -= removed
        for growing in (self._keys, self._values, self._bias):
            if growing is not None:
                growing.drop_last(removed)

    def _map_rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        for growing in (self._keys, self._values, self._bias):
            if growing is not None:
                growing.map_rows(pick)
        self.positions = None if self.positions is None else pick(self.positions)
        self.recent = None if self.recent is None else pick(self.recent)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda rows: rows[indices])


def _own(states: Tensor) -> Tensor:
    """`states`, copied if it is a part of something larger that it would keep alive."""
    return states.clone() if states.untyped_storage().nbytes() > states.nbytes else states
