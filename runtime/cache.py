"""The compressed KV cache: a transformers ``Cache`` whose layers shrink as soon as the prompt's attention is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from flowmm.errors import FlowmmError, InputError
from flowmm.runtime.attention import attend_compressed
from flowmm.runtime.compression import compress_layer, cross_rows
from flowmm.runtime.flow import sampled_rho
from flowmm.runtime.growing import Growing
from flowmm.runtime.layer import FlowLayer
from flowmm.runtime.prompt import PromptLayout
from flowmm.runtime.recompression import Conversation, recompress_layer, remembered_queries
from flowmm.runtime.report import LayerRecord, PrefillRecord
from flowmm.runtime.rotary import Rotary
from flowmm.runtime.settings import CompressionSettings, Prompt
from flowmm.runtime.shared import Shared

Base = Callable[..., tuple[Tensor, Tensor | None]]
"""The host's attention of one layer: of the call as it came, or of the query, key, value and mask it is given."""


class FlowCache(Cache):
    """A cache that compresses a prompt layer by layer during its prefill and then grows by one entry per token.

    Use it through :func:`flowmm.compress`; on its own it refuses to run, because compression needs the queries that
    only flowmm's attention function sees.
    """

    layer_type: type[FlowLayer] = FlowLayer

    def __init__(self, settings: CompressionSettings) -> None:
        # The same objects as `layers`, under the type that flowmm knows.
        self.states = [self.layer_type() for _ in settings.modes]
        super().__init__(layers=[*self.states])
        self.settings = settings
        self._forget()

    @classmethod
    def from_states(
        cls,
        settings: CompressionSettings,
        layout: PromptLayout,
        states: Sequence[tuple[Tensor, Tensor, Tensor]],
        scaling: float,
        rotary: Rotary | None = None,
        shared: Sequence[Shared] | None = None,
    ) -> Self:
        """The cache that a prefill with these states would have left behind, without running the model.

        Args:
            settings: of the run.
            layout: modality, padding, lengths of the prompt.
            states: query ``[B, Hq, L, D]``, key and value ``[B, Hkv, L, D]`` of each layer, after RoPE.
            scaling: softmax scale.
            rotary: of the prompt, where ``settings.method.needs_rotary``.
            shared: of each layer, the same for all caches of one prompt, to compute once what they have in common.

        Raises:
            InputError: a row holds nothing but padding.
        """
        cache = cls(settings)
        cache._prompt, cache._rotary = Prompt.of(layout, settings), rotary
        for layer, (query, key, value) in enumerate(states):
            cache.states[layer].update(key, value)
            cache._compress(layer, cache._prompt, query, scaling, None if shared is None else shared[layer])
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
        """Bytes of all entries held now: keys, values and biases."""
        return sum(layer.nbytes for layer in self.states)

    def contents(self) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Keys, values, bias and positions of each layer; padding that a whole prompt still holds has bias -inf."""
        prompt, contents = self._prompt, []
        for layer in self.states:
            keys, values = layer.first_entries(layer.kept)
            bias = layer.bias
            if prompt is not None and prompt.whole and prompt.layout.padded:
                bias = keys.new_zeros(keys.shape[:3])
                bias[..., : prompt.width].masked_fill_(~prompt.layout.valid[:, None], float("-inf"))
            contents.append((keys, values, bias, layer.positions))
        return contents

    @property
    def reserved_bytes(self) -> int:
        """Bytes taken beyond :attr:`nbytes` for tokens to come."""
        return sum(layer.reserved_bytes for layer in self.states)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def _forget(self) -> None:
        self._prompt: Prompt | None = None
        self._announced: PromptLayout | int | None = None
        self._rotary: Rotary | None = None
        self._in_forward = self._last_row_only = self._attended_last_row = False
        self.ids: Growing | None = None
        self.rope_deltas: Tensor | None = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.ids is not None:
            self.ids.drop_last(abs(int(tokens_to_remove)))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices])

    def _map_rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        if self.ids is not None:
            self.ids.map_rows(pick)

    def announce_chunks(self, visual: Tensor, valid: Tensor) -> None:
        """Say what the prompt is, because it will come in several forward calls.

        Args:
            visual, valid: as for :meth:`begin_forward`, of the whole prompt.
        """
        self._announced = PromptLayout.from_masks(visual, valid)

    def announce_drafts(self, prompt_length: int) -> None:
        """Say that the first forward call brings `prompt_length` tokens of the prompt and drafted tokens after them."""
        self._announced = prompt_length

    def begin_forward(
        self, visual: Tensor, valid: Tensor, ids: Tensor | None = None, last_row_only: bool = False
    ) -> None:
        """Take note of the tokens about to be fed.

        Args:
            visual: ``[B, q]`` bool.
            valid: ``[B, q]`` bool, False on padding.
            ids: ``[B, q]``, remembered for :attr:`ids`.
            last_row_only: the call returns nothing of any token but the last one of each row.

        Raises:
            InputError: a row of nothing but padding, or padding inside the tokens of a later turn.
        """
        self._in_forward, self._last_row_only, self._attended_last_row = True, last_row_only, False
        seen = self.get_seq_length()
        if seen == 0:
            self._prompt = self._next_prompt(visual, valid)
        elif visual.shape[1] > 1 and self._open_rows(seen) == 0 and not bool(valid.all()):
            raise InputError(
                "the new tokens of this turn contain padding; continue rows of different length one by one"
            )
        if ids is not None:
            self._remember_ids(ids)

    def begin_token(self, ids: Tensor) -> None:
        """:meth:`begin_forward` for one generated token per row, ``[B, 1]``: text, and no padding."""
        self._in_forward = True
        self._remember_ids(ids)

    def _remember_ids(self, ids: Tensor) -> None:
        if self.ids is None:
            self.ids = Growing(ids, dim=1)
        else:
            self.ids.append(ids)

    def _next_prompt(self, visual: Tensor, valid: Tensor) -> Prompt:
        announced, self._announced = self._announced, None
        if isinstance(announced, PromptLayout):
            return Prompt.of(announced, self.settings, in_chunks=True)
        end = visual.shape[1] if announced is None else announced
        return Prompt.of(PromptLayout.from_masks(visual[:, :end], valid[:, :end]), self.settings)

    @property
    def reads_prompt(self) -> bool:
        """Whether part of the prompt is still to come."""
        return self._open_rows(self.get_seq_length()) > 0

    def _open_rows(self, seen: int) -> int:
        """Rows of the prompt that come after the first `seen`; none once all its layers went through.

        What is fed then is new, also where it takes the place of tokens that were cropped.
        """
        if self._prompt is None or len(self._prompt.record.layers) == len(self.states):
            return 0
        return max(0, self._prompt.width - seen)

    def see_rotary(self, cos: Tensor, sin: Tensor, sections: list[int]) -> None:
        """Take note of the rotary embedding of the tokens about to be fed, see :meth:`Rotary.from_host`."""
        if self._open_rows(self.get_seq_length()) == 0 and self.settings.recompress_every is None:
            return
        part = Rotary.from_host(cos, sin, sections)
        self._rotary = part if self._rotary is None else self._rotary.followed_by(part)

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
        """Attention of one layer: the host's own for the prompt, then compression; afterwards over what was kept."""
        states, prompt = self.states[layer], self._prompt
        new = query.shape[2]
        start = states.seen - new
        if prompt is None and start == 0:
            raise FlowmmError("attention ran before the cache saw the prompt; call the top model, not an inner module")
        rows = min(new, self._open_rows(start))
        whole = prompt is not None and prompt.whole
        if rows == new and not whole and self._last_row_only and layer == len(self.states) - 1:
            output = _of_last_row(base, query, key, value, mask)
            self._attended_last_row = True
        elif whole or rows == new:
            output = base()
        elif rows == 0:
            output = attend_compressed(query, key, value, states.bias, scaling), None
        else:
            width = start + rows
            output = base(
                query[:, :, :rows],
                key[:, :, :width],
                value[:, :, :width],
                None if mask is None else mask[..., :rows, :width],
            )
        if prompt is not None and rows:
            self._finish_rows(layer, prompt, query[:, :, :rows], start, scaling)
        if rows == 0 and prompt is not None and self.settings.recompress_every is not None:
            self._compress_again(layer, prompt, query, scaling)
        if 0 < rows < new and not whole:
            output = self._with_drafts(output[0], query[:, :, rows:], states, scaling), None
        if layer == len(self.states) - 1:
            self._in_forward = False
        return output

    def takes_last_row_only(self) -> bool:
        """Whether the call under way attended in the last layer for the last token alone; told once, then forgotten."""
        told, self._attended_last_row = self._attended_last_row, False
        return told

    @staticmethod
    def _with_drafts(prompt: Tensor, query: Tensor, states: FlowLayer, scaling: float) -> Tensor:
        """The prompt's output ``[B, L, Hq, D]`` and that of the drafted tokens, which see the compressed prompt."""
        keys, values = states.first_entries(states.kept)
        return torch.cat([prompt, attend_compressed(query, keys, values, states.bias, scaling)], dim=1)

    def _finish_rows(self, layer: int, prompt: Prompt, query: Tensor, start: int, scaling: float) -> None:
        """Remember what rows of the prompt must be remembered; compress once its last row was seen."""
        if prompt.rows is not None:
            prompt.rows.remember(layer, query, start)
        if start + query.shape[2] < prompt.width:
            return
        if prompt.rows is not None:
            query = prompt.rows.recall(layer, prompt.width)
        self._compress(layer, prompt, query, scaling)
        if layer < len(self.states) - 1:
            return
        if self.settings.recompress_every is None:
            self._rotary = None
        if self.settings.check is not None:
            findings = self.settings.check.compare(prompt.record.layers, prompt.layout.mixed.tolist())
            prompt.record.findings.extend(findings)
            self._in_forward = False
            self.settings.check.act(prompt.record.findings)

    @torch.no_grad()
    def _compress(
        self, layer: int, prompt: Prompt, query: Tensor, scaling: float, shared: Shared | None = None
    ) -> None:
        """Compress the prompt's entries of a layer; `query` ``[B, Hq, width, D]``."""
        settings, states, layout = self.settings, self.states[layer], prompt.layout
        mode, method, counts = settings.modes[layer], settings.method_of(layer), prompt.counts[layer]
        key, value = states.first_entries(prompt.width)
        rotary = None if self._rotary is None else self._rotary.first(prompt.width)
        rows = prompt.rho_rows
        # Whatever precision a caller lets the model's products lose.
        with torch.autocast(query.device.type, enabled=False):
            rho = None if rows is None else sampled_rho(query, key, layout, rows, scaling)
            cross = cross_rows(mode, None if rho is None else rho.rho, layout, method)
            if settings.check is not None and rho is not None:
                cross = settings.check.adapt(cross, rho, layer, method)
            bytes_before, compressed = key.nbytes + value.nbytes, None
            # A padded layer goes through even when it keeps everything: its padding must leave.
            if not prompt.whole and (counts != layout.lengths or layout.padded):
                compressed = compress_layer(
                    query,
                    key,
                    value,
                    layout,
                    prompt.proxies,
                    counts,
                    cross,
                    method,
                    scaling,
                    rotary,
                    layer,
                    shared,
                    operation=settings.operation,
                )
                states.replace_prompt(compressed, prompt.width)
        bytes_after = states.bytes_per_entry * (prompt.width if compressed is None else max(counts))
        record = LayerRecord.of(layer, mode, cross, rho, counts, key.shape[1], compressed)
        prompt.record.layers.append(record.with_bytes(bytes_before, bytes_after))

    @torch.no_grad()
    def _compress_again(self, layer: int, prompt: Prompt, query: Tensor, scaling: float) -> None:
        """Compress a layer to the budget of all its tokens when it is time; `query` ``[B, Hq, q, D]`` of the latest."""
        settings, states, method = self.settings, self.states[layer], self.settings.method_of(layer)
        states.remember_queries(query, remembered_queries(method))
        # Counted in tokens, not in entries, so that every row of a batch is compressed when it would be on its own.
        later = states.seen - (states.prompt_length or prompt.width)
        if settings.recompress_every is None or later < settings.recompress_every or self.ids is None:
            return
        answered = states.seen - prompt.width
        held = tuple(entries + later for entries in states.row_entries or prompt.counts[layer])
        allowed = (settings.entries(length + answered)[layer] for length in prompt.layout.lengths)
        counts = tuple(map(min, allowed, held))
        if counts == held:
            return
        conversation = Conversation(
            visual=torch.isin(self.ids.filled, torch.tensor(settings.visual_ids, device=query.device)),
            cross=prompt.record.layers[layer].cross,
            rotary=self._rotary,
        )
        with torch.autocast(query.device.type, enabled=False):
            recompress_layer(states, held, counts, conversation, method, scaling, layer)
        states.row_entries = counts
        prompt.record.recompressions[layer] += 1


def _of_last_row(base: Base, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
    """Attention of the last token over all entries, and zeros for the tokens before it, whose output nobody reads."""
    last, _ = base(query[:, :, -1:], key, value, None if mask is None else mask[..., -1:, :])
    return torch.nn.functional.pad(last, (0, 0, 0, 0, query.shape[2] - 1, 0)), None
