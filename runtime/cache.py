"""The compressed KV cache: a transformers ``Cache`` whose layers shrink as soon as the prompt's attention is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from flowmm.errors import FlowmmError, InputError
from flowmm.plans import MethodParameters, Mode
from flowmm.runtime.attention import attend_compressed
from flowmm.runtime.budgets import Entries
from flowmm.runtime.compression import CompressedLayer, compress_layer, cross_rows
from flowmm.runtime.flow import sample_rows, sampled_rho
from flowmm.runtime.online import OnlineCheck
from flowmm.runtime.prompt import PromptLayout, Proxies, find_proxies
from flowmm.runtime.report import LayerRecord, PrefillRecord
from flowmm.runtime.rotary import Rotary

Base = Callable[[], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class CompressionSettings:
    """What a cache needs to know to compress any prompt.

    Attributes:
        method: all options of the algorithm.
        modes: planned mode of each layer.
        entries: how many entries each layer keeps of a prompt of some length.
        check: online comparison of rho with the plan, or ``None``.
        rho_rows: rows per modality sampled where rho is measured online.
        seed: of the row sample.
    """

    method: MethodParameters
    modes: tuple[Mode, ...]
    entries: Entries
    check: OnlineCheck | None = None
    rho_rows: int = 128
    seed: int = 0


class FlowLayer(DynamicLayer):
    """One layer: compressed prompt entries, then every generated token.

    ``seen`` counts true tokens, the tensors hold fewer; masks and positions of the host library follow ``seen``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.seen = 0
        self.prompt_length = 0
        self.bias: Tensor | None = None
        self.positions: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = key_states.shape[-2]
        self.seen += new
        if self.bias is not None:
            self.bias = pad(self.bias, (0, new))
        return super().update(key_states, value_states, *args, **kwargs)

    def replace_prompt(self, compressed: CompressedLayer) -> None:
        """Swap the prompt's full entries for its compressed ones."""
        self.keys, self.values = compressed.entries.keys, compressed.entries.values
        self.bias, self.positions = compressed.entries.bias, compressed.positions
        self.prompt_length = self.seen

    def replace_by_rows(self, layers: Sequence[FlowLayer]) -> None:
        """Hold the rows of several layers that saw equally many tokens; the shorter get empty slots at their end."""
        width = max(layer.kept for layer in layers)
        keys, values, biases = zip(*(layer._widened(width) for layer in layers), strict=True)
        self.lazy_initialization(keys[0], values[0])
        self.keys, self.values = torch.cat(keys), torch.cat(values)
        if any(layer.bias is not None or layer.kept < width for layer in layers):
            self.bias = torch.cat(biases)
        self.seen, self.prompt_length = layers[0].seen, layers[0].prompt_length

    def _widened(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and bias with empty slots up to `width`."""
        keys, values = self.keys, self.values
        if keys is None or values is None:
            raise FlowmmError("a layer that has seen no prompt has no rows")
        bias = torch.zeros(keys.shape[:3], device=keys.device) if self.bias is None else self.bias
        gap = width - keys.shape[-2]
        return pad(keys, (0, 0, 0, gap)), pad(values, (0, 0, 0, gap)), pad(bias, (0, gap), value=float("-inf"))

    @property
    def kept(self) -> int:
        """Entries held per KV head, generated tokens included."""
        return self.keys.shape[-2] if self.is_initialized and self.keys is not None else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the real tensors: keys, values and bias."""
        held = (self.keys, self.values, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

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
        super().crop(-removed)
        self.seen -= removed
        if self.bias is not None and removed:
            self.bias = self.bias[..., :-removed]

    def _map_rows(self, pick: Any) -> None:
        self.bias = None if self.bias is None else pick(self.bias)
        self.positions = None if self.positions is None else pick(self.positions)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices])


@dataclass(frozen=True)
class Prompt:
    """One batch of prompts and what was decided for it before its first layer ran.

    Attributes:
        layout: modality, padding, lengths.
        proxies: rows that give importance.
        counts: per layer, the entries that each row keeps.
        whole: every layer keeps everything: the host's attention runs untouched.
        rho_rows: sampled visual and text rows for an online rho.
        record: filled layer by layer.
    """

    layout: PromptLayout
    proxies: Proxies
    counts: tuple[tuple[int, ...], ...]
    whole: bool
    rho_rows: tuple[tuple[Tensor, Tensor], ...]
    record: PrefillRecord

    @classmethod
    def of(cls, layout: PromptLayout, settings: CompressionSettings) -> Prompt:
        """Budgets, proxies and row sample of a prompt.

        Raises:
            InputError: a row holds nothing but padding.
        """
        if min(layout.lengths) == 0:
            raise InputError(f"row {layout.lengths.index(0)} of the batch holds nothing but padding")
        by_row = [settings.entries(length) for length in layout.lengths]
        counts = tuple(zip(*by_row, strict=True))
        generator = torch.Generator().manual_seed(settings.seed)
        strata = (layout.visual, layout.valid & ~layout.visual)
        return cls(
            layout=layout,
            proxies=find_proxies(layout, settings.method.proxies),
            counts=counts,
            whole=all(layer == layout.lengths for layer in counts),
            rho_rows=tuple(sample_rows(stratum, settings.rho_rows, generator) for stratum in strata),
            record=PrefillRecord(lengths=layout.lengths, layers=[], findings=[]),
        )


class FlowCache(Cache):
    """A cache that compresses a prompt layer by layer during its prefill and then grows by one entry per token.

    Use it through :func:`flowmm.compress`; on its own it refuses to run, because compression needs the queries that
    only flowmm's attention function sees.
    """

    def __init__(self, settings: CompressionSettings) -> None:
        # The same objects as `layers`, under the type that flowmm knows.
        self.states = [FlowLayer() for _ in settings.modes]
        super().__init__(layers=[*self.states])
        self.settings = settings
        self._prompt: Prompt | None = None
        self._rotary: Rotary | None = None
        self._in_forward = False

    @classmethod
    def from_states(
        cls,
        settings: CompressionSettings,
        layout: PromptLayout,
        states: Sequence[tuple[Tensor, Tensor, Tensor]],
        scaling: float,
        rotary: Rotary | None = None,
    ) -> Self:
        """The cache that a prefill with these states would have left behind, without running the model.

        Args:
            settings: of the run.
            layout: modality, padding, lengths of the prompt.
            states: query ``[B, Hq, L, D]``, key and value ``[B, Hkv, L, D]`` of each layer, after RoPE.
            scaling: softmax scale.
            rotary: of the prompt, where ``settings.method.needs_rotary``.

        Raises:
            InputError: a row holds nothing but padding.
        """
        cache = cls(settings)
        cache._prompt, cache._rotary = Prompt.of(layout, settings), rotary
        for layer, (query, key, value) in enumerate(states):
            cache.states[layer].update(key, value)
            cache._compress(layer, cache._prompt, query, key, value, scaling)
        cache._rotary = None
        return cache

    @classmethod
    def stack(cls, caches: Sequence[FlowCache]) -> FlowCache:
        """One batch made of the rows of several caches, to decode them together; it has no record of its own.

        Every cache must have seen equally many tokens of one and the same prompt.
        """
        stacked = cls(caches[0].settings)
        for layer, rows in zip(stacked.states, zip(*(cache.states for cache in caches), strict=True), strict=True):
            layer.replace_by_rows(rows)
        prompt = caches[0]._prompt
        stacked._prompt = None if prompt is None else replace(prompt, whole=False)
        return stacked

    @property
    def record(self) -> PrefillRecord | None:
        """What the last prefill did, or ``None`` before the first."""
        return None if self._prompt is None else self._prompt.record

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and biases held now."""
        return sum(layer.nbytes for layer in self.states)

    def reset(self) -> None:
        super().reset()
        self._prompt, self._rotary, self._in_forward = None, None, False

    def begin_forward(self, visual: Tensor, valid: Tensor) -> None:
        """Take note of the tokens about to be fed.

        Args:
            visual: ``[B, q]`` bool.
            valid: ``[B, q]`` bool, False on padding.

        Raises:
            InputError: a row of nothing but padding, or padding inside the tokens of a later turn.
        """
        self._in_forward = True
        if self.get_seq_length() == 0:
            self._prompt = Prompt.of(PromptLayout.from_masks(visual, valid), self.settings)
        elif visual.shape[1] > 1 and not bool(valid.all()):
            raise InputError(
                "the new tokens of this turn contain padding; continue rows of different length one by one"
            )

    def see_rotary(self, cos: Tensor, sin: Tensor, sections: list[int]) -> None:
        """Take note of the rotary embedding of the tokens about to be fed, see :meth:`Rotary.from_host`."""
        self._rotary = Rotary.from_host(cos, sin, sections)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self._in_forward:
            raise FlowmmError(
                "this cache was used outside its `with flowmm.compress(...)` block (or by calling an inner module); "
                "keep generation inside the block and call the top model"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, base: Base
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one layer: the host's own in prefill, then compression; afterwards over what was kept."""
        states, prompt = self.states[layer], self._prompt
        if prompt is None:
            raise FlowmmError("attention ran before the cache saw the prompt; call the top model, not an inner module")
        last = layer == len(self.states) - 1
        if states.seen == query.shape[2]:
            output = base()
            self._compress(layer, prompt, query, key, value, scaling)
            if last:
                self._end_forward()
            if last and self.settings.check is not None:
                prompt.record.findings.extend(
                    self.settings.check.compare(prompt.record.layers, prompt.layout.mixed.tolist())
                )
                self.settings.check.act(prompt.record.findings)
            return output
        if last:
            self._end_forward()
        if prompt.whole:
            return base()
        return attend_compressed(query, key, value, states.bias, scaling), None

    def _end_forward(self) -> None:
        self._in_forward, self._rotary = False, None

    @torch.no_grad()
    def _compress(self, layer: int, prompt: Prompt, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        settings, states, layout = self.settings, self.states[layer], prompt.layout
        mode, method, counts = settings.modes[layer], settings.method, prompt.counts[layer]
        rho = None
        if mode == "online" or settings.check is not None:
            rho = sampled_rho(query, key, layout, prompt.rho_rows, scaling)
        cross = cross_rows(mode, None if rho is None else rho.rho, layout, method)
        if settings.check is not None and rho is not None:
            cross = settings.check.adapt(cross, rho, layer, method)
        bytes_before, compressed = states.nbytes, None
        # A padded layer goes through even when it keeps everything: its padding must leave.
        if not prompt.whole and (counts != layout.lengths or layout.padded):
            compressed = compress_layer(
                query, key, value, layout, prompt.proxies, counts, cross, method, scaling, self._rotary, layer
            )
            states.replace_prompt(compressed)
        record = LayerRecord.of(layer, mode, cross, rho, counts, key.shape[1], compressed)
        prompt.record.layers.append(record.with_bytes(bytes_before, states.nbytes))
