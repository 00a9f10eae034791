"""What ``model.generate`` asks of a compressed conversation: its cache, its positions, how its prompt arrives, and what
decodes a token.

transformers has no extension point for these four questions, so four of its methods are shadowed on the model object
while a block is open. Blocks may overlap: the last one to close takes the shadows away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from flowmm.errors import InputError
from flowmm.models import visual_mask
from flowmm.runtime.cache import FlowCache
from flowmm.runtime.static_cache import StaticFlowCache
from flowmm.runtime.token_code import TokenCall

CACHE, POSITIONS, PREFILL, COMPILED_CALL = (
    "_prepare_cache_for_generation",
    "_prepare_position_ids_for_generation",
    "_prefill",
    "get_compiled_call",
)
# What transformers leaves on a model that it compiled.
COMPILED = ("_compiled_call", "_last_compile_config")
# Guards which blocks are open on a model, and the position offsets that a model keeps in one place for all prompts.
_lock = threading.RLock()


class OpenBlock(Protocol):
    """A ``compress`` block; `compile_config`: transformers' options for compiled decoding, None to decode as told."""

    @property
    def compile_config(self) -> Any: ...

    def new_cache(self) -> FlowCache:
        """An empty cache."""
        ...

    def static_cache(self, room: int) -> StaticFlowCache:
        """An empty static cache with room for so many tokens after the prompt."""
        ...


class GenerateShadow:
    """Stands in for four methods of a model; one object per model, shared by all its open blocks."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._blocks: list[tuple[OpenBlock, int]] = []
        self._originals = {name: getattr(model, name) for name in self._shadows()}
        self._own = {name: method for name, method in self._originals.items() if name in vars(model)}
        self._compiled = {name: vars(model)[name] for name in COMPILED if name in vars(model)}
        # Between two questions of one call of generate.
        self._call = threading.local()

    def block_of_this_thread(self) -> OpenBlock:
        """The latest block that this thread opened, or else the latest of all."""
        here = [block for block, thread in self._blocks if thread == threading.get_ident()]
        return here[-1] if here else self._blocks[-1][0]

    def open(self, block: OpenBlock) -> None:
        """Add a block; the first one puts the shadows on."""
        if not self._blocks:
            for name, shadow in self._shadows().items():
                setattr(self._model, name, shadow)
        self._blocks.append((block, threading.get_ident()))

    def _shadows(self) -> dict[str, Callable[..., Any]]:
        return {
            CACHE: self.cache,
            POSITIONS: self.positions,
            PREFILL: self.prefill,
            COMPILED_CALL: self.compiled_call,
        }

    def close(self, block: OpenBlock) -> None:
        """Remove a block; the last one takes the shadows off."""
        self._blocks = [entry for entry in self._blocks if entry[0] is not block]
        if not self._blocks:
            for name in self._originals:
                delattr(self._model, name)
            for name in COMPILED:
                vars(self._model).pop(name, None)
            for name, attribute in (self._own | self._compiled).items():
                setattr(self._model, name, attribute)

    def positions(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """Positions of a conversation, whatever other conversation the model served last."""
        cache = model_kwargs.get("past_key_values")
        with _lock:
            restore_offsets(self._model, cache)
            positions = self._originals[POSITIONS](inputs_tensor, model_kwargs)
            self._call.offsets = offsets_of(self._model)
        self._call.length = inputs_tensor.shape[1]
        return positions

    def cache(self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any) -> Any:
        """A flowmm cache where the caller passes none."""
        _refuse_unsupported(generation_config)
        assisted = "assisted" in str(generation_mode).lower()
        block = self.block_of_this_thread()
        if model_kwargs.get("past_key_values") is None:
            compiles = block.compile_config is not None and not assisted
            if compiles or generation_config.cache_implementation == "static":
                # The host would make a static cache of its own.
                generation_config.cache_implementation = None
                made = block.static_cache(generation_config.max_length - self._call.length)
            else:
                made = block.new_cache()
            model_kwargs["past_key_values"] = made
        cache = model_kwargs["past_key_values"]
        if isinstance(cache, StaticFlowCache):
            if generation_config.compile_config is None:
                generation_config.compile_config = block.compile_config
            # A prompt still to come is compressed before it takes room.
            cache.ensure_room(generation_config.max_length - (int(cache.get_seq_length()) or self._call.length))
        if isinstance(cache, FlowCache):
            cache.rope_deltas = getattr(self._call, "offsets", None)
            if assisted:
                self._expect_drafts(cache)
        return self._originals[CACHE](generation_config, model_kwargs, generation_mode, *args)

    def _expect_drafts(self, cache: FlowCache) -> None:
        if isinstance(cache, StaticFlowCache):
            raise InputError(
                "assisted decoding (assistant_model, prompt_lookup_num_tokens) takes back drafted tokens, which a "
                "static cache cannot; leave cache_implementation='static' out"
            )
        if cache.settings.recompress_every is not None:
            raise InputError(
                "assisted decoding (assistant_model, prompt_lookup_num_tokens) takes back drafted tokens, which "
                "recompress_every could have merged; leave one of them out"
            )
        if cache.get_seq_length() > 0:
            raise InputError(
                "assisted decoding (assistant_model, prompt_lookup_num_tokens) starts with a fresh cache: transformers "
                "would feed the whole conversation again; leave it out in later turns"
            )
        cache.announce_drafts(self._call.length)

    def prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Tell a cache about a prompt that will come in chunks."""
        cache = model_kwargs.get("past_key_values")
        chunked = generation_config.prefill_chunk_size is not None
        if chunked and isinstance(cache, FlowCache) and cache.get_seq_length() == 0:
            visual = visual_mask(self._model.config, input_ids)
            cache.announce_chunks(visual, valid_tokens(model_kwargs.get("attention_mask"), input_ids))
        with cache.prefill() if isinstance(cache, StaticFlowCache) else nullcontext():
            return self._originals[PREFILL](input_ids, generation_config, model_kwargs, *args, **kwargs)

    def compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """What decodes the tokens of one answer: kept code on a CPU where a block's own options are asked for."""
        original = partial(self._originals[COMPILED_CALL], compile_config)
        ours = compile_config is not None and any(block.compile_config is compile_config for block, _ in self._blocks)
        return TokenCall(self._model, original) if ours and self._model.device.type == "cpu" else original()


def _refuse_unsupported(generation_config: Any) -> None:
    refused = {
        "cache_implementation": generation_config.cache_implementation not in (None, "dynamic", "static"),
        "use_cache=False": generation_config.use_cache is False,
    }
    for option, asked in refused.items():
        if asked:
            raise InputError(f"generate(...) inside compress(...) does not support {option}; leave it out")


def valid_tokens(mask: Any, ids: Tensor) -> Tensor:
    """``[B, q]`` bool of the tokens `ids` ``[B, q]``: False on padding.

    Args:
        mask: a padding mask ``[B, n]`` whose last columns belong to `ids`, or ``None``.

    Raises:
        InputError: a mask of another kind.
    """
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, -ids.shape[1] :].bool().to(ids.device)
    raise InputError("compress(...) needs the 2-D padding mask [batch, tokens] (or none), not a prepared one")


def _holder_of_offsets(model: Any) -> Any:
    """The module that keeps, for the latest prompt, how far positions lag behind token counts; None: no such model."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, "rope_deltas") else None


def offsets_of(model: Any) -> Tensor | None:
    """How far positions of the latest prompt lag behind token counts (M-RoPE), or ``None``."""
    holder = _holder_of_offsets(model)
    return None if holder is None else holder.rope_deltas


def restore_offsets(model: Any, cache: Any) -> None:
    """Give the model the offsets of the conversation in `cache`, if it holds one."""
    holder = _holder_of_offsets(model)
    if holder is not None and isinstance(cache, FlowCache) and cache.get_seq_length() > 0:
        holder.rope_deltas = cache.rope_deltas


@contextmanager
def shadowed_generate(model: Any, block: OpenBlock) -> Generator[GenerateShadow]:
    """Let ``model.generate`` make and continue compressed conversations for the duration of the block."""
    with _lock:
        shadow = getattr(vars(model).get(CACHE), "__self__", None)
        if not isinstance(shadow, GenerateShadow):
            shadow = GenerateShadow(model)
        shadow.open(block)
    try:
        yield shadow
    finally:
        with _lock:
            shadow.close(block)
