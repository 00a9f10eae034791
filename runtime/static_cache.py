"""The compressed cache in memory of fixed shape: decoding compiles to one graph, and CUDA graphs find their buffers.

A prompt is read and compressed as in the growing cache. Its entries are then copied into buffers with room for the
answer; from there on nothing depends on a Python number that changes from token to token. A cache that is reset keeps
its buffers, so the next prompt of about the same length runs in the same memory and the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowmm.errors import FlowmmError, InputError
from flowmm.runtime.attention import attend_compressed, attend_one_token
from flowmm.runtime.cache import Base, FlowCache
from flowmm.runtime.layer import FlowLayer
from flowmm.runtime.settings import CompressionSettings, Prompt
from flowmm.runtime.shared import Shared

# Capacities are multiples of this, so that prompts of similar length share buffers and graphs.
BUCKET = 256


class Buffers:
    """Memory of one layer: keys and values ``[B, Hkv, C, D]``, bias ``[B, Hkv, C]`` (-inf where empty), counters."""

    def __init__(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        batch, heads, _, dim = keys.shape
        self.keys = keys.new_zeros(batch, heads, capacity, dim)
        channels = values.shape[-1]
        if _sums_in_loops(values):
            # Stored by channel, so that a channel's sum over all entries reads memory in order.
            self.values = values.new_zeros(batch, heads, channels, capacity).transpose(2, 3)
        else:
            self.values = values.new_zeros(batch, heads, capacity, channels)
        self.bias = keys.new_zeros(batch, heads, capacity)
        self.filled = torch.zeros((), dtype=torch.long, device=keys.device)
        self.seen = torch.zeros((), dtype=torch.long, device=keys.device)
        for tensor in (self.keys, self.values, self.bias, self.filled, self.seen):
            # CUDA graphs skip what is written in place unless its address is known to stay.
            torch._dynamo.mark_static_address(tensor)

    @property
    def capacity(self) -> int:
        """Entries that fit."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and bias."""
        return self.keys.nbytes + self.values.nbytes + self.bias.nbytes

    def fits(self, keys: Tensor, entries: int) -> bool:
        """Whether `entries` entries like `keys` ``[B, Hkv, n, D]`` can be held."""
        same = self.keys.shape[:2] == keys.shape[:2] and self.keys.shape[3] == keys.shape[3]
        return same and self.keys.dtype == keys.dtype and self.capacity >= entries

    def load(self, keys: Tensor, values: Tensor, bias: Tensor | None, seen: int) -> None:
        """Hold these entries and no others."""
        kept = keys.shape[2]
        self.keys[:, :, :kept].copy_(keys)
        self.values[:, :, :kept].copy_(values)
        self.bias[:, :, kept:].fill_(float("-inf"))
        self.bias[:, :, :kept].copy_(torch.zeros_like(self.bias[:, :, :kept]) if bias is None else bias)
        self.filled.fill_(kept)
        self.seen.fill_(seen)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add entries ``[B, Hkv, q, D]`` behind the fill pointer."""
        count = keys.shape[2]
        slots = torch.arange(count, device=keys.device) + self.filled
        self.keys.index_copy_(2, slots, keys)
        self.values.index_copy_(2, slots, values)
        self.bias.index_fill_(2, slots, 0.0)
        self.filled.add_(count)
        self.seen.add_(count)

    def map_rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows by `pick` of them, in place."""
        for tensor in (self.keys, self.values, self.bias):
            tensor.copy_(pick(tensor))


class StaticFlowLayer(FlowLayer):
    """One layer: a :class:`FlowLayer` until its prompt is compressed, then :class:`Buffers`."""

    def __init__(self) -> None:
        self.settled = False
        self.buffers: Buffers | None = None
        super().__init__()

    def settle(self, room: int) -> None:
        """Move the entries into buffers with room for `room` more."""
        keys, values = self.first_entries(self.kept)
        needed = keys.shape[2] + room
        if self.buffers is None or not self.buffers.fits(keys, needed):
            self.buffers = Buffers(keys, values, -(-needed // BUCKET) * BUCKET)
        self.buffers.load(keys, values, self.bias, self.seen)
        self._keys = self._values = self._bias = None
        self.settled = True

    def unsettle(self) -> None:
        """Take the entries out of the buffers, which stay reserved; waits for the device."""
        if self.buffers is None:
            raise FlowmmError("this layer holds no compressed prompt yet")
        self.seen = int(self.buffers.seen)
        self.keys, self.values, self.bias = (tensor.clone() for tensor in self.held() if tensor is not None)
        self.settled = False

    @property
    def free(self) -> int:
        """Entries that may still come; waits for the device."""
        return 0 if self.buffers is None else self.buffers.capacity - self.kept

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.settled or self.buffers is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self.buffers.append(key_states, value_states)
        return self.buffers.keys, self.buffers.values

    def held(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and bias of the entries held; waits for the device."""
        kept = self.kept
        if not self.settled or self.buffers is None:
            return *self.first_entries(kept), self.bias
        return self.buffers.keys[:, :, :kept], self.buffers.values[:, :, :kept], self.buffers.bias[:, :, :kept]

    @property
    def kept(self) -> int:
        return int(self.buffers.filled) if self.settled and self.buffers is not None else super().kept

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.held() if tensor is not None) if self.settled else super().nbytes

    @property
    def reserved_bytes(self) -> int:
        return (
            self.buffers.nbytes - self.nbytes if self.buffers is not None and self.settled else super().reserved_bytes
        )

    # The host compares and adds it; a tensor keeps compiled code free of a number that changes.
    def get_seq_length(self) -> Any:
        return self.buffers.seen if self.settled and self.buffers is not None else self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.settled and self.buffers is not None:
            return self.buffers.capacity, 0
        return super().get_mask_sizes(query_length)

    def reset(self) -> None:
        self.settled = False
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        if int(tokens_to_remove) and self.settled:
            raise FlowmmError("a static cache takes nothing back; use the growing cache for drafted tokens")
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.settled and self.buffers is not None:
            self.buffers.map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))
        super().reorder_cache(beam_idx)


class StaticFlowCache(FlowCache):
    """A :class:`FlowCache` whose entries, once compressed, lie in buffers of fixed shape.

    Args:
        settings: of the run.
        room: tokens to come after the prompt.
    """

    layer_type = StaticFlowLayer

    def __init__(self, settings: CompressionSettings, room: int) -> None:
        if settings.recompress_every is not None:
            raise InputError("recompress_every needs the growing cache; leave it or the static cache out")
        self.room = room
        self._in_prefill = False
        super().__init__(settings)

    @property
    def _static_states(self) -> list[StaticFlowLayer]:
        return [layer for layer in self.states if isinstance(layer, StaticFlowLayer)]

    @property
    def settled(self) -> bool:
        """Whether the prompt is compressed and the next tokens go into the buffers."""
        last = self.states[-1]
        return isinstance(last, StaticFlowLayer) and last.settled

    @property
    def is_compileable(self) -> bool:
        # Read by the host to choose compiled decoding, and to build square masks, which a prompt has no use for.
        return not self._in_prefill

    @contextmanager
    def prefill(self) -> Generator[None]:
        """Around forward calls that bring many tokens, which run uncompiled."""
        self._in_prefill = True
        try:
            yield
        finally:
            self._in_prefill = False

    def ensure_room(self, room: int) -> None:
        """Have space for `room` more tokens, in larger buffers if need be; waits for the device."""
        self.room = room
        for layer in self._static_states:
            if layer.settled and layer.free < room:
                layer.unsettle()
                layer.settle(room)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.states[layer_idx].get_seq_length()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.states[layer_idx]
        if isinstance(layer, StaticFlowLayer) and layer.settled:
            return layer.update(key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, base: Base
    ) -> tuple[Tensor, Tensor | None]:
        states = self.states[layer]
        if not isinstance(states, StaticFlowLayer) or not states.settled or states.buffers is None:
            return super().attend(layer, query, key, value, mask, scaling, base)
        if query.shape[2] == 1:
            in_loops = torch.compiler.is_compiling() and _sums_in_loops(query)
            attend = attend_one_token if in_loops else attend_compressed
            return attend(query, key, value, states.buffers.bias, scaling), None
        return attend_compressed(query, *states.held(), scaling), None

    def _compress(
        self, layer: int, prompt: Prompt, query: Tensor, scaling: float, shared: Shared | None = None
    ) -> None:
        super()._compress(layer, prompt, query, scaling, shared)
        states = self.states[layer]
        if not isinstance(states, StaticFlowLayer):
            return
        if prompt.whole and prompt.layout.padded:
            keys, _ = states.first_entries(states.kept)
            states.bias = keys.new_zeros(keys.shape[:3]).masked_fill_(~prompt.layout.valid[:, None], float("-inf"))
        states.settle(self.room)


def _sums_in_loops(tensor: Tensor) -> bool:
    """Whether compiled code attends from this device in its own loops, for a dtype whose sums need no wider one."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32
